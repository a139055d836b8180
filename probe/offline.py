"""`OfflineEntropyProbe`: the whole probe from a configuration, in two lines of Python."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probe.callbacks.defaults import default_callbacks
from probe.config.files import read_config_file
from probe.config.parsing import ResolvedConfig, parse_config
from probe.module import EntropyProbe
from probe.results.result import ProbeResult
from probe.runner import ProbeRunner, TrainerSection


class OfflineEntropyProbe:
    """Predicts and measures what the next update does to a checkpoint's entropy.

    Example:
        >>> probe = OfflineEntropyProbe.from_config_file("configs/quickstart.yaml")  # doctest: +SKIP
        >>> results = probe.run_mixed_probe()  # doctest: +SKIP
        >>> results["deltaH1"], results["deltaH_true"]  # doctest: +SKIP

    Attributes:
        config: the resolved configuration, as a mapping of its own (`trainer` and `seed_everything` included); what a
            checkpoint fills in (`probe_rework.from_checkpoint`) is in `result.config`.
        runner: devices, loggers and the state of the last run.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Check a configuration; nothing is loaded yet.

        Args:
            config: sections as mappings, as in the YAML files; what is left out has its default.

        Raises:
            ConfigError: an unknown key, a wrong type or an impossible value.
        """
        self._given = copy.deepcopy(dict(config))
        self._resolved: ResolvedConfig = parse_config(self._given, TrainerSection)
        self.config: dict[str, Any] = self._resolved.mapping
        self.runner = ProbeRunner(**self._resolved.trainer)
        self._module: EntropyProbe | None = None

    @classmethod
    def from_config_file(cls, path: str | Path) -> OfflineEntropyProbe:
        """The probe that a YAML file describes.

        Args:
            path: the file, or the name of a configuration that comes with the package (`quickstart`).

        Raises:
            ConfigError: the file is missing, is not YAML or not a valid configuration.
        """
        return cls(read_config_file(path))

    def run_mixed_probe(self, checkpoint_path: str | Path | None = None) -> dict[str, Any]:
        """Run the phases that the configuration asks for.

        Args:
            checkpoint_path: probe this checkpoint instead of `checkpoint.checkpoint_path`.

        Returns:
            The result mapping, see `probe.results.RESULT_KEYS`; plain Python types throughout.

        Raises:
            ProbeError: whatever went wrong, in one line. A result that could not be written is on the exception as
                `.results`.
        """
        if checkpoint_path is not None:
            given = copy.deepcopy(self._given)
            given["checkpoint"] = {**(given.get("checkpoint") or {}), "checkpoint_path": str(checkpoint_path)}
            self._use(parse_config(given, TrainerSection))
        if self._module is None:
            self._module = EntropyProbe(self._resolved.probe, self._resolved.seed, self._resolved.given)
        callbacks = default_callbacks(self._module.config)
        return dict(self.runner.run(self._module, callbacks, self._resolved.mapping).values)

    @property
    def result(self) -> ProbeResult | None:
        """The last run's result object."""
        return self.runner.result

    def _use(self, resolved: ResolvedConfig) -> None:
        """Take another configuration over, dropping the loaded policy where it is another one."""
        if resolved.mapping != self._resolved.mapping:
            self._module = None
        self._resolved, self.config = resolved, resolved.mapping
