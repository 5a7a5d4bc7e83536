"""`python -m specedit` is the command `specedit`."""

import sys

from .cli import main

sys.exit(main())
