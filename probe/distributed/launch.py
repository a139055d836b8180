"""Starting the processes of a run, through Lightning Fabric."""

from __future__ import annotations

from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from probe.distributed.crew import Crew, crew_at_work
from probe.distributed.sharding import NAMES, Setup
from probe.errors.exceptions import ConfigError
from probe.text import first_line

BY_SCRIPT = "popen"
"""How Fabric starts processes that run the whole program: `strategy: ddp`."""


def check_name(strategy: object) -> None:
    """Refuse the name of a strategy that passes cannot be shared out by, before anything is asked of it.

    Raises:
        ConfigError: it is one.
    """
    if isinstance(strategy, str) and strategy not in ("auto", *NAMES) and not strategy.startswith("ddp"):
        raise ConfigError(f"trainer.strategy: expected auto, ddp or fsdp, found {strategy!r}")


def check_strategy(fabric: Fabric) -> None:
    """Refuse what passes cannot be shared out by.

    Raises:
        ConfigError: the strategy is another one, or starts processes in a way that commands have no place in.
    """
    strategy = fabric.strategy
    if isinstance(strategy, SingleDeviceStrategy):
        return
    name = type(strategy).__name__
    if isinstance(strategy, ModelParallelStrategy):
        return
    if not isinstance(strategy, DDPStrategy):
        raise ConfigError(f"trainer.strategy: expected auto, ddp or fsdp, found {name}")
    if strategy._start_method != BY_SCRIPT:
        raise ConfigError(
            f"trainer.strategy: expected ddp, whose processes run the program from its start, found {name} with the "
            f"start method {strategy._start_method!r}; in a notebook take one device, or call the command line"
        )


def setup_of(fabric: Fabric) -> Setup | None:
    """What shards a policy over the processes; None where each of them holds the whole."""
    strategy = fabric.strategy
    return strategy.setup_module if isinstance(strategy, ModelParallelStrategy) else None


def launched(fabric: Fabric) -> Crew:
    """Start the processes, or find those that a launcher has started, and join them.

    Raises:
        ConfigError: they cannot be started, or do not find each other.
    """
    crew = Crew(getattr(fabric.strategy.launcher, "procs", []), single=fabric.world_size == 1)
    try:
        with crew_at_work(crew):
            fabric.launch()
            crew.join()
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"trainer.devices: expected {fabric.world_size} processes that find each other, found: {reason}"
        ) from error
    return crew
