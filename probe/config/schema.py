"""The configuration schema: one dataclass per section of the YAML, one doc line per field.

The same schema serves the command line (`entropy-probe run --config FILE`), `OfflineEntropyProbe(config)` and
`OfflineEntropyProbe.from_config_file(FILE)`. Values are checked where a section is built; every message names the
key, what was expected and what was found.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from probe.config.attribution import AttributionConfig
from probe.config.batches import BatchConfig, GenerationConfig, MemoryConfig
from probe.config.checkpoint import CheckpointConfig
from probe.config.estimation import ImportanceConfig, ProbeReworkConfig
from probe.config.output import DetailedLoggingConfig, OutputConfig
from probe.config.what_if import WhatIfConfig
from probe.errors.exceptions import ConfigError


@dataclass(frozen=True)
class ProbeConfig:
    """All sections that describe a probe (devices and precision belong to `trainer:`, see `ProbeRunner`)."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    batch_config: BatchConfig = field(default_factory=BatchConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    memory_config: MemoryConfig = field(default_factory=MemoryConfig)
    probe_rework: ProbeReworkConfig = field(default_factory=ProbeReworkConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    whatif: WhatIfConfig = field(default_factory=WhatIfConfig)
    detailed_logging: DetailedLoggingConfig = field(default_factory=DetailedLoggingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        """Check what spans sections."""
        if not (self.probe_rework.compute_delta_h1 or self.importance.enabled):
            raise ConfigError(
                "probe_rework.compute_delta_h1 and importance.enabled: expected at least one of them true, found both "
                "false; there is nothing to compute"
            )
        if self.attribution.enabled and not self.probe_rework.compute_delta_h1:
            raise ConfigError(
                "attribution.enabled: expected probe_rework.compute_delta_h1 true too, found false; the attribution is "
                "that of deltaH1"
            )
        if self.attribution.enabled and not self.probe_rework.predicts_a_step:
            raise ConfigError(
                "attribution.enabled: expected probe_rework.step: optimizer or closed_form, found preconditioned, "
                "which is no step that an optimizer takes"
            )
        asked = [key for key in ("interventions", "exact", "target_deltaH") if getattr(self.whatif, key)]
        if asked and not self.whatif.enabled:
            raise ConfigError(
                f"whatif.{asked[0]}: expected whatif.enabled true beside it, found false; take "
                "entropy-probe whatif, or set it"
            )
        if self.whatif.enabled and not self.attribution.enabled:
            raise ConfigError(
                "whatif.enabled: expected attribution.enabled true too, found false; interventions are weighed by the "
                "contributions of U's tokens"
            )


SECTIONS = {f.name: f.default_factory for f in fields(ProbeConfig)}
"""The sections of a configuration and their dataclasses."""
