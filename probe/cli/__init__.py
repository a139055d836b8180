"""The command line."""

from probe.cli.main import main

__all__ = ["main"]
