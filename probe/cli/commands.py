"""What the subcommands do."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from probe.callbacks.defaults import default_callbacks
from probe.cli.parser import READERS, Command, parse
from probe.cli.texts import NEXT_STEPS, SUMMARIES
from probe.errors.exceptions import ConfigError
from probe.module import EntropyProbe
from probe.plan.command import execute as execute_plan
from probe.plan.sizes import Plan
from probe.results.result import ProbeResult
from probe.runner import ProbeRunner, TrainerSection
from probe.snapshot import one_thread
from probe.sweep.loop import execute, refuse_failures

__all__ = ["ProbeCLI", "TrainerSection"]


class ProbeCLI(LightningCLI):
    """A LightningCLI with an `EntropyProbe` for its model, a `ProbeRunner` for its trainer, and its subcommands here.

    The parser is that of `probe.cli.parser`, which understands what a LightningCLI's does and loads no library for it.

    Attributes:
        command: the command line, understood.
    """

    command: Command

    def __init__(self, args: Command | list[str] | None = None) -> None:
        """Build module and runner, and run the subcommand.

        Args:
            args: the command line with its shorthands written out, or what the parser has made of it already; by
                default that of the process.

        Raises:
            ProbeError: whatever went wrong, in one line.
        """
        super().__init__(
            EntropyProbe,
            ProbeRunner,  # type: ignore[arg-type]
            save_config_callback=None,  # the resolved configuration is saved with the log files
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,  # type: ignore[arg-type]
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The methods of this class that are commands."""
        return {name: set() for name in SUMMARIES if name not in READERS}

    def setup_parser(self, add_subcommands: bool, *_: Any) -> None:
        """Nothing to set up: `parse` makes its own."""
        self.parser = LightningArgumentParser()

    def parse_arguments(self, parser: LightningArgumentParser | None, args: ArgsType) -> None:
        """Understand the command line."""
        understood: Any = args
        if not isinstance(understood, Command):
            understood = parse(list(sys.argv[1:] if args is None else args), lambda: TrainerSection)
            if not isinstance(understood, Command):
                raise ConfigError(
                    f"expected a subcommand that probes, found {understood.name}, which reads files"
                )
        name = understood.name
        self.command, self.config = understood, Namespace({"subcommand": name, name: Namespace()})

    def _set_seed(self) -> None:
        """Nothing: a run seeds the global generators itself and puts them back."""

    def instantiate_classes(self) -> None:
        """Build module and runner."""
        resolved = self.command.resolved
        self.model = EntropyProbe(resolved.probe, resolved.seed, resolved.given)
        self.trainer: Any = ProbeRunner(**resolved.trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        """Call the method of that name."""
        {"demo": self.demo, "sweep": self.sweep, "plan": self.plan}.get(subcommand, self.run)()

    def run(self) -> ProbeResult:
        """Probe a checkpoint; `attribute` and `whatif` are runs with their sections switched on."""
        callbacks = default_callbacks(self.model.config)
        return self.trainer.run(self.model, callbacks, self.command.resolved.mapping)

    def demo(self) -> None:
        """Probe the built-in demo policy and say what to try next."""
        with one_thread():  # the model is so small that threads would mostly wait for each other
            self.run()
        on_path = shutil.which("entropy-probe") is not None
        print(NEXT_STEPS.format(bin="" if on_path else f"{os.path.relpath(Path(sys.executable).parent)}/"))

    def sweep(self) -> None:
        """Probe every point of a grid.

        Raises:
            IncompleteSweepError: some points failed; everything else is done.
        """
        assert self.command.sweep is not None
        refuse_failures(execute(self.trainer, self.model, self.command.sweep))

    def plan(self) -> Plan:
        """Run a pilot and say how large a run must be."""
        assert self.command.plan is not None
        return execute_plan(self.trainer, self.model, self.command.plan)
