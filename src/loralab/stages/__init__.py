"""`kind: pipeline`: stages one after the other, each skipped when what it reads is unchanged."""
