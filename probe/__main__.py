"""The command `entropy-probe`, also as `python -m probe`."""

from __future__ import annotations

import sys

try:
    from probe.cli.main import main
except KeyboardInterrupt:
    print("entropy-probe: error: interrupted while starting", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
