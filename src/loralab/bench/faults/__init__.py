"""`loralab bench faults`: faults on purpose, healthy runs beside them, and who notices.

`faults`, `healthy`: the tables. `trial`: one run to its record. `judgement`, `peers`, `page`: what
the records say, made again without the runs. `command`: the command line.
"""

from loralab.bench.faults.command import main as main
