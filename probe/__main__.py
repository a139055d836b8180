"""`python -m probe` is the command `entropy-probe`."""

import sys

from probe.cli import main

sys.exit(main())
