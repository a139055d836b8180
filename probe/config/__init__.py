"""The configuration: its schema, its files, its parser."""

from probe.config.batches import BatchConfig, GenerationConfig, MemoryConfig
from probe.config.checkpoint import CheckpointConfig
from probe.config.estimation import ImportanceConfig, ProbeReworkConfig
from probe.config.output import LOG_LEVELS, DetailedLoggingConfig, LogLevel, OutputConfig
from probe.config.schema import ProbeConfig

__all__ = [
    "LOG_LEVELS",
    "BatchConfig",
    "CheckpointConfig",
    "DetailedLoggingConfig",
    "GenerationConfig",
    "ImportanceConfig",
    "LogLevel",
    "MemoryConfig",
    "OutputConfig",
    "ProbeConfig",
    "ProbeReworkConfig",
]
