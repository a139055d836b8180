"""The command `entropy-probe`, also as `python -m probe`."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command line; Ctrl-C while the libraries are still being imported ends it in one line, too."""
    try:
        from probe.cli.main import main as run
    except KeyboardInterrupt:
        print("entropy-probe: error: interrupted while starting", file=sys.stderr)
        return INTERRUPTED
    return run()


if __name__ == "__main__":
    sys.exit(main())
