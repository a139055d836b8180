"""The parser of the command line: the subcommands of `entropy-probe`, each with `--config FILE`.

It works as that of a LightningCLI does: `--help`, `--print_config`, `--config FILE`, `--section.key VALUE`, and
`class_path` with `init_args` for callbacks and loggers. Nothing here imports a library that computes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from textwrap import wrap
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from probe.callbacks.base import ProbeCallback
from probe.cli.shorthands import SWEEP_LISTS, name_list
from probe.cli.texts import DESCRIPTION, DESCRIPTIONS, SUMMARIES, USAGE
from probe.config.explain import explain
from probe.config.files import SHIPPED_CONFIGS, read_config_file, shipped_names
from probe.config.parsing import ResolvedConfig, add_probe_arguments, resolve
from probe.config.trainer import TrainerConfig
from probe.errors.exceptions import ConfigError, closest, did_you_mean
from probe.imports import current_directory_importable
from probe.plan.settings import PlanConfig
from probe.sweep.settings import SweepConfig, sweep_config

OWN_SECTIONS: dict[str, type] = {"sweep": SweepConfig, "plan": PlanConfig}
"""The sections that only one subcommand has, by its name."""
SWITCHED_ON = {"attribute": ("attribution",), "whatif": ("attribution", "whatif")}
"""The sections that a subcommand switches on."""
READERS = {"report": "probe.cli.old_logs", "compare": "probe.cli.compare"}
"""The subcommands that read what runs and trainings have left and need no configuration, with what executes them."""
QUICKSTART = SHIPPED_CONFIGS / "quickstart.yaml"


class Logger(ABC):
    """Stands for Lightning's class of this name as long as no logger is given: importing that one takes seconds."""

    @abstractmethod
    def log_metrics(self) -> None:
        """Without it jsonargparse would take this class itself for a logger to choose."""


NO_LIBRARIES = TrainerConfig[ProbeCallback, Logger]
"""What `trainer:` gives, as far as it can be read without Lightning."""


class _NeedsClassesError(Exception):
    """Something under `trainer.callbacks` or `trainer.logger` can only be told with the real classes."""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps indented lines of the descriptions, and fits paragraphs to the terminal."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Join the lines of a paragraph (an option begins a new one) and wrap it."""
        paragraphs = re.sub(r"(?<=\S)\n(?=\w)", " ", text).split("\n")
        lines: list[str] = []
        for line in paragraphs:
            whole = line[:1] in ("", " ")
            lines += [line] if whole else wrap(line, width - len(indent), break_on_hyphens=False)
        return "".join(f"{indent}{line}\n" for line in lines)


@dataclass(frozen=True)
class Command:
    """A command line that was understood.

    Attributes:
        name: of the subcommand.
        resolved: the configuration.
        sweep: what is swept; None for the others.
        plan: the pilot of a plan; None for the others.
    """

    name: str
    resolved: ResolvedConfig
    sweep: SweepConfig | None = None
    plan: PlanConfig | None = None


@dataclass(frozen=True)
class Reading:
    """A command line of a subcommand that reads files.

    Attributes:
        name: of the subcommand.
        options: its arguments by their names.
    """

    name: str
    options: Mapping[str, Any]


def parse(args: list[str], classes: Callable[[], type]) -> Command | Reading:
    """Parse a command line whose shorthands are written out.

    Args:
        args: the arguments.
        classes: gives `TrainerConfig` of the real classes of callbacks and loggers; called where they are needed.

    Raises:
        ConfigError: an unknown option or key, a wrong type or an impossible value.
        SystemExit: the help or the configuration was asked for, and is printed.
    """
    try:
        return _parse(args, NO_LIBRARIES)
    except _NeedsClassesError:
        return _parse(args, classes())


def check_subcommand(args: list[str]) -> None:
    """Refuse a command line without a subcommand, before what follows is read as options of one.

    Raises:
        ConfigError: the first word is none, or an option stands in its place; names the nearest.
    """
    first = args[0] if args else "--help"
    if not first.startswith("-") and first not in SUMMARIES:
        raise ConfigError(
            f"expected a subcommand ({', '.join(SUMMARIES)}), found {first!r}"
            f"{did_you_mean(closest(first, SUMMARIES))}"
        )
    asks = ("-h", "--help", "--print_config", "--print_config=")
    if first.startswith("-") and not first.startswith(asks) and not set(args) & set(SUMMARIES):
        raise ConfigError(
            f"expected a subcommand ({', '.join(SUMMARIES)}) before its options, found {first!r}: "
            f"entropy-probe run {' '.join(args)}"
        )


def _parse(args: list[str], trainer: type) -> Command | Reading:
    """See `parse`."""
    parsers = {
        name: _reader_parser(name) if name in READERS else _subcommand_parser(name, trainer)
        for name in SUMMARIES
    }
    parser = _main_parser(parsers)
    try:
        with current_directory_importable():
            config, own = parser.parse_args(args), parser.parse_args(args, defaults=False)
    except (ArgumentError, TypeError, ValueError) as error:
        if trainer is NO_LIBRARIES and re.search(r"trainer\.(callbacks|logger)", str(error)):
            raise _NeedsClassesError from error
        asked = args[0] if args and args[0] in parsers else "run"
        if asked in READERS:
            text = " ".join(str(error).replace(f"{asked}.", "").split())
            raise ConfigError(f"{text}; usage: entropy-probe {asked} {USAGE[asked]}") from error
        raise ConfigError(name_list(explain(str(error), parsers[asked]))) from error
    name = config.subcommand
    if name in READERS:
        return Reading(name, _reading_options(config[name]))
    resolved = resolve(parsers[name], config[name], _given(name, own[name]))
    for section in OWN_SECTIONS:
        resolved.mapping.pop(section, None)  # the rest is what describes a run
    if name == "sweep":
        return Command(name, resolved, sweep=sweep_config(vars(config.sweep.sweep)))
    if name == "plan":
        return Command(name, resolved, plan=PlanConfig(**vars(config.plan.plan)))
    return Command(name, resolved)


def _given(subcommand: str, own: Namespace) -> dict[str, Any]:
    """The sections with the keys that are given; what makes `demo` the demo counts as given."""
    given = own.as_dict()
    if subcommand == "demo":
        for name, keys in read_config_file(QUICKSTART).items():
            if isinstance(keys, dict):
                given[name] = {**keys, **(given.get(name) or {})}
    return given


def _main_parser(parsers: dict[str, ArgumentParser]) -> ArgumentParser:
    """The parser of everything before and after the subcommand."""
    parser = _new_parser(
        prog="entropy-probe",
        description=DESCRIPTION.format(configs=", ".join(shipped_names())),
        usage="entropy-probe SUBCOMMAND [--config NAME_OR_FILE] ...",
        formatter_class=_HelpFormatter,
    )
    subcommands = parser.add_subcommands()
    for name, subparser in parsers.items():
        subcommands.add_subcommand(name, subparser, help=SUMMARIES[name])
    return parser


def _subcommand_parser(name: str, trainer: type) -> ArgumentParser:
    """The parser of a subcommand; those of `sweep` and `plan` have a section of their own."""
    lists = " ".join(f"--{option}" for option in (*SWEEP_LISTS, "checkpoints"))
    parser = _new_parser(
        description=DESCRIPTIONS[name].format(configs=", ".join(shipped_names()), lists=lists),
        usage=_usage(f"entropy-probe {name} {USAGE[name]}"),
        default_config_files=[str(QUICKSTART)] if name == "demo" else None,
    )
    add_probe_arguments(parser, trainer)
    parser.set_defaults({f"{section}.enabled": True for section in SWITCHED_ON.get(name, ())})
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    if name in OWN_SECTIONS:
        parser.add_class_arguments(OWN_SECTIONS[name], name)
    (checkpoint,) = (action for action in parser._actions if action.option_strings == ["--checkpoint"])
    checkpoint.help = "Folder of the checkpoint, or a YAML file with this section."
    checkpoint.metavar = "FOLDER"
    return parser


def _reader_parser(name: str) -> ArgumentParser:
    """The parser of a subcommand that reads files."""
    parser = ArgumentParser(
        exit_on_error=False,
        description=DESCRIPTIONS[name],
        usage=f"entropy-probe {name} {USAGE[name]}",
        formatter_class=_HelpFormatter,
    )
    if name == "report":
        parser.add_argument("log", type=str, help="What a run or a training has left.", metavar="LOG")
        parser.add_argument(
            "--output", type=str, help="The HTML file to write; by default beside LOG.", metavar="FILE"
        )
    else:
        parser.add_argument(
            "A", type=str, help="Main log of a run (.json or .json.gz), from level detailed on."
        )
        parser.add_argument("B", type=str, help="Main log of another run on the same E.")
        parser.add_argument(
            "--unpaired", action="store_true", help="Where E differs, take the errors as independent."
        )
        parser.add_argument(
            "--output.results_path",
            type=str | None,
            default=None,
            help="Write the comparison to this JSON file.",
        )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def _reading_options(given: Namespace) -> dict[str, Any]:
    """The arguments of a subcommand that reads files, by the names that its function has for them."""
    return {
        key.rpartition(".")[2].lower(): value for key, value in given.items(branches=False) if key != "debug"
    }


def _usage(text: str) -> str:
    """The usage in lines of 80 columns, broken between options."""
    bound = re.sub(r"\[[^]]*\]", lambda option: option[0].replace(" ", "\0"), text)
    return "\n".join(wrap(bound, 73, subsequent_indent="    ", break_on_hyphens=False)).replace("\0", " ")


def _new_parser(**options: Any) -> ArgumentParser:
    """A parser with `--config`, whose errors are raised."""
    header = [f"lightning.pytorch=={version('lightning')}"]
    parser = ArgumentParser(exit_on_error=False, dump_header=header, **options)
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
    )
    return parser
