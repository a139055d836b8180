"""The work of the subcommands."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from probe.callbacks.defaults import default_callbacks
from probe.cli.parser import Command
from probe.cli.texts import NEXT_STEPS
from probe.module import EntropyProbe
from probe.runner import ProbeRunner, TrainerSection
from probe.snapshot import one_thread
from probe.sweep.loop import execute, refuse_failures

__all__ = ["TrainerSection", "carry_out"]


def carry_out(command: Command) -> None:
    """Build the objects of a command and do its work.

    Raises:
        ProbeError: whatever went wrong, in one line.
    """
    resolved = command.resolved
    module = EntropyProbe(resolved.probe, resolved.seed, resolved.given)
    runner = ProbeRunner(**resolved.trainer)
    if command.sweep is not None:
        refuse_failures(execute(runner, module, command.sweep))
    elif command.name == "demo":
        demo(runner, module, command)
    else:
        run(runner, module, command)


def run(runner: ProbeRunner, module: EntropyProbe, command: Command) -> None:
    """Probe a checkpoint."""
    runner.run(module, default_callbacks(module.config), command.resolved.mapping)


def demo(runner: ProbeRunner, module: EntropyProbe, command: Command) -> None:
    """Probe the built-in demo policy and say what to try next."""
    with one_thread():  # the model is so small that threads would mostly wait for each other
        run(runner, module, command)
    on_path = shutil.which("entropy-probe") is not None
    print(NEXT_STEPS.format(bin="" if on_path else f"{os.path.relpath(Path(sys.executable).parent)}/"))
