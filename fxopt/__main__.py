"""`python -m fxopt`."""

import sys

from fxopt.cli import main

sys.exit(main())
