"""`python -m simrl` is the command `simrl`."""

import sys

from simrl.cli import main

sys.exit(main())
