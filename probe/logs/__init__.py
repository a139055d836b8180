"""The log of a run: what it holds, at which level, and where it is written."""

from probe.files.log_files import load_log
from probe.logs.document import build_log, summary
from probe.logs.store import prune

__all__ = ["build_log", "load_log", "prune", "summary"]
