"""`OfflineEntropyProbe`: the whole probe from a configuration, in two lines of Python."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probe.callbacks.defaults import default_callbacks
from probe.config.files import read_config_file
from probe.config.parsing import ResolvedConfig, parse_config
from probe.errors.exceptions import ConfigError
from probe.loading.tokenizer import token_decoder
from probe.module import EntropyProbe
from probe.report.figures import result_figures
from probe.report.html.run import write_page
from probe.report.notebook import Figures, Results, ShownResult, card, result_card
from probe.results.result import ProbeResult
from probe.runner import ProbeRunner, TrainerSection
from probe.text import printable


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

    def run_mixed_probe(self, checkpoint_path: str | Path | None = None) -> Results:
        """Run the phases that the configuration asks for.

        Args:
            checkpoint_path: probe this checkpoint instead of `checkpoint.checkpoint_path`.

        Returns:
            The result mapping, see `probe.results.RESULT_KEYS`: a dictionary of plain Python types throughout, which
            a notebook shows, and which has `.plot()`.

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
        return Results(self.runner.run(self._module, callbacks, self._resolved.mapping).values)

    @property
    def result(self) -> ShownResult | None:
        """The last run's result object."""
        return None if self.runner.result is None else ShownResult.of(self.runner.result)

    def plot(self) -> Figures:
        """The figures of the last run.

        Raises:
            ConfigError: nothing has run.
        """
        return Figures(result_figures(self._last().values))

    def report(self, path: str | Path) -> Path:
        """Write the last run as one self-contained HTML page, as `output.report_path` does.

        Of several processes the first one writes.

        Args:
            path: the file, replaced as a whole.

        Returns:
            The path.

        Raises:
            ConfigError: nothing has run.
            LogError: the file cannot be written.
        """
        result, config = self._last(), self.runner.config.detailed_logging
        tokenizer = None if self._module is None else self._module.tokenizer
        if not self.runner.fabric.is_global_zero:
            return Path(path)
        return write_page(path, result, self.runner.state, config, token_decoder(tokenizer))

    def _last(self) -> ProbeResult:
        """The last run's result.

        Raises:
            ConfigError: nothing has run.
        """
        if self.runner.result is None:
            raise ConfigError("expected a finished run, found none; call run_mixed_probe() first")
        return self.runner.result

    def __repr__(self) -> str:
        checkpoint = self.config["checkpoint"]["checkpoint_path"]
        sizes = ", ".join(f"{name}={self.config['batch_config'][name]}" for name in ("B_E", "B_U", "G"))
        ran = "not run yet" if self.runner.result is None else f"last run {self.runner.result.verdict.word}"
        return printable(f"OfflineEntropyProbe({checkpoint!r}, {sizes}; {ran})")

    def _repr_html_(self) -> str:
        """What is probed, and the last result, for a notebook."""
        values = {} if self.runner.result is None else self.runner.result.values
        return result_card(values, repr(self)) if values else card(repr(self), [], (), ())

    def _use(self, resolved: ResolvedConfig) -> None:
        """Take another configuration over, dropping the loaded policy where it is another one."""
        if resolved.mapping != self._resolved.mapping:
            self._module = None
        self._resolved, self.config = resolved, resolved.mapping
