"""The probe of a configuration, loaded: what benchmarks that look into its phases begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from probe.config.parsing import parse_config
from probe.distributed.sharding import Setup
from probe.module import EntropyProbe
from probe.runner import TrainerSection


def loaded_probe(sections: Mapping[str, Any], setup: Setup | None = None) -> EntropyProbe:
    """The module of these sections of a configuration with its policy on the CPU; sharded where there is a `setup`."""
    resolved = parse_config(sections, TrainerSection)
    module = EntropyProbe(resolved.probe, resolved.seed, resolved.given)
    module.load(torch.device("cpu"), setup)
    return module
