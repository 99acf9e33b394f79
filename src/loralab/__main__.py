"""`python -m loralab`: what `accelerate launch -m loralab` starts in each process."""

import sys

from loralab.cli import main

sys.exit(main())
