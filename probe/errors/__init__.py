"""The exceptions of the package, and what every message is made with."""

from probe.errors.exceptions import (
    CheckpointError,
    ConfigError,
    DataError,
    LogError,
    NumericalError,
    OptimizerStateError,
    ProbeError,
    RolloutError,
    nearest,
    require,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LogError",
    "NumericalError",
    "OptimizerStateError",
    "ProbeError",
    "RolloutError",
    "nearest",
    "require",
]
