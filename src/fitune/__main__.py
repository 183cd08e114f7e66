"""`python -m fitune`: the command line."""

import sys

from fitune.cli import main

sys.exit(main())
