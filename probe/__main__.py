"""The command `entropy-probe`, also as `python -m probe`."""

from __future__ import annotations

import sys

from probe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
