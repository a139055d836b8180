"""The result of a run: one frozen object, and the mapping that scripts read."""

from probe.results.diagnostic_keys import DIAGNOSTIC_KEYS
from probe.results.keys import RESULT_KEYS
from probe.results.result import ProbeResult

__all__ = ["DIAGNOSTIC_KEYS", "RESULT_KEYS", "ProbeResult"]
