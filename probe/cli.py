"""The command line: `entropy-probe run`, `demo` and `sweep`, each with `--config FILE`, and `python -m probe`."""

from __future__ import annotations

import logging
import re
import signal
import sys
import threading
import traceback
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any

import torch
from jsonargparse import ArgumentError, DefaultHelpFormatter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from probe import __version__
from probe.__main__ import INTERRUPTED
from probe.errors import ConfigError, ProbeError
from probe.imports import current_directory_importable
from probe.module import EntropyProbe
from probe.parsing import (
    SHIPPED_CONFIGS,
    add_probe_arguments,
    explain,
    find_config_file,
    read_config_file,
    resolve,
    shipped_names,
)
from probe.runner import ProbeRunner
from probe.sweep.grid import IncompleteSweepError, SweepConfig, sweep_config
from probe.text import error_text, printable, text_of

QUICKSTART = SHIPPED_CONFIGS / "quickstart.yaml"
USAGE_ERROR = 2
INTERNAL_ERROR = 1
INCOMPLETE = 3
"""Some points of a sweep failed; the others are there."""
TERMINATED = 143
MEMORY_REMEDY = (
    "lower memory_config.microbatch_size, memory_config.head_chunk_tokens or generation.batch_size, or take "
    "checkpoint.dtype: bfloat16 or checkpoint.load_in_4bit: true"
)
SWEEP_OPTIONS = tuple(field.name for field in fields(SweepConfig))
SWEEP_LISTS = {
    **{"learning_rates": "1e-4, 3e-4", "eta_factors": "0.5, 1, 2", "B_E": "256, 1024", "B_U": "16, 64"},
    **{"G": "4, 8", "seeds": "1, 2, 3"},
}
"""Options of `sweep` that are lists of numbers, with examples."""


USAGE = {
    "run": "[--config NAME_OR_FILE] [--checkpoint FOLDER] [--section.key VALUE ...]",
    "demo": "[--section.key VALUE ...]",
    "sweep": "[--config NAME_OR_FILE] [--checkpoint FOLDER] [--LIST VALUES ...] [--section.key VALUE ...]",
}
"""What the help of a subcommand begins with."""
DESCRIPTION = """Predict and measure what the next update does to a policy's entropy.

examples:
  entropy-probe demo
  entropy-probe run --config quickstart
  entropy-probe run --config my.yaml --checkpoint /path/to/checkpoint-60
  entropy-probe sweep --config quickstart --eta_factors "[0.5, 1, 2]"

--config takes a YAML file, or the name of a configuration that comes with the package:
  {configs}"""
DESCRIPTIONS = {
    "run": """Probe a checkpoint: predict what the next update does to the policy's entropy, and measure it.

examples:
  entropy-probe run --config quickstart
  entropy-probe run --config qwen2_5_1_5b_gsm8k --checkpoint /path/to/checkpoint-60
  entropy-probe run --checkpoint /path/to/checkpoint-60 --batch_config.dataset_name prompts.jsonl \\
      --batch_config.split train --batch_config.reward my_rewards:accuracy

--config takes a YAML file, or the name of a configuration that comes with the package:
  {configs}
--checkpoint takes the folder of a checkpoint, as transformers' Trainer and TRL write it (an adapter or a full model,
with optimizer.pt); it is short for --checkpoint.checkpoint_path. Loss, sampling and sizes that are not given come from
the training_args.bin beside it (--probe_rework.from_checkpoint). The options below are the keys of a YAML file.""",
    "demo": """Probe the built-in demo policy, which is made at the first use (half a minute), and say what to try next.

examples:
  entropy-probe demo
  entropy-probe demo --probe_rework.learning_rate 5e-3

The options below are those of entropy-probe run; their defaults here are those of the configuration quickstart.""",
    "sweep": """Probe a grid of learning rates, batch sizes, seeds and checkpoints. The same command continues it.

examples:
  entropy-probe sweep --config quickstart --eta_factors "[0.25, 0.5, 1, 2, 4, 8]"
  entropy-probe sweep --config quickstart --B_E "[128, 512, 2048]" --seeds "[0, 1, 2]"

lists: {lists}; --output_folder FOLDER keeps the points, --overwrite starts anew.
--config takes a YAML file, or the name of a configuration that comes with the package:
  {configs}
--checkpoint takes the folder of a checkpoint; it is short for --checkpoint.checkpoint_path. The options below are the
keys of a YAML file.""",
}


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the descriptions."""


class ProbeCLI(LightningCLI):
    """LightningCLI over `ProbeRunner`'s methods and the sections of the probe's configuration.

    `--help`, `--print_config`, `--config FILE`, `--section.key VALUE` and `class_path` / `init_args` for callbacks
    and loggers work as in any Lightning CLI.
    """

    def __init__(self, args: ArgsType = None) -> None:
        """Parse `args`, build the objects and run the subcommand."""
        demo = {"default_config_files": [str(QUICKSTART)]}
        super().__init__(
            model_class=EntropyProbe,
            trainer_class=ProbeRunner,  # type: ignore[arg-type]
            save_config_callback=None,  # the resolved configuration is saved with the log files
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": "entropy-probe",
                "description": DESCRIPTION.format(configs=", ".join(shipped_names())),
                "usage": "entropy-probe {run,demo,sweep} [--config NAME_OR_FILE] ...",
                "formatter_class": _HelpFormatter,
                "exit_on_error": False,
                "run": {"exit_on_error": False},
                "demo": {"exit_on_error": False, **demo},
                "sweep": {"exit_on_error": False},
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of `ProbeRunner`, and the arguments that are not options."""
        return {"run": {"module"}, "demo": {"module"}, "sweep": {"module", "sweep"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Nothing: `seed_everything` is part of the probe's schema."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections of the configuration."""
        add_probe_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """The parser of a subcommand; that of `sweep` has a section of its own."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "sweep":
            (parser.groups or {}).pop(
                "sweep", None
            )  # that of the method's own options, of which there are none
            parser.add_class_arguments(SweepConfig, "sweep")
        parser.usage = f"entropy-probe {subcommand} {USAGE[subcommand]}"
        lists = " ".join(f"--{option}" for option in (*SWEEP_LISTS, "checkpoints"))
        parser.description = DESCRIPTIONS[subcommand].format(configs=", ".join(shipped_names()), lists=lists)
        for action in parser._actions:
            if action.option_strings == ["--checkpoint"]:
                action.help, action.metavar = (
                    "Folder of the checkpoint, or a YAML file with this section.",
                    "FOLDER",
                )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line.

        Raises:
            ConfigError: an unknown option or key, or a wrong type.
        """
        try:
            with current_directory_importable():
                self.config = parser.parse_args(args)  # type: ignore[arg-type]
                self.given = parser.parse_args(args, defaults=False)  # type: ignore[arg-type]
        except (ArgumentError, TypeError, ValueError) as error:
            asked = args[0] if isinstance(args, list) and args and args[0] in self.subcommands() else "run"
            message = explain(str(error), self._subcommand_parsers[asked])
            raise ConfigError(_name_list(message)) from error

    def _set_seed(self) -> None:
        """Nothing: a run seeds the global generators itself and puts them back."""

    def instantiate_classes(self) -> None:
        """Build the module and the runner from the parsed configuration."""
        given = self.given[str(self.subcommand)].as_dict()
        if self.subcommand == "demo":  # its defaults are a configuration, too
            for name, keys in read_config_file(QUICKSTART).items():
                if isinstance(keys, dict):
                    given[name] = {**keys, **(given.get(name) or {})}
        resolved = resolve(self._parser(self.subcommand), self.config[self.subcommand], given)
        resolved.mapping.pop("sweep", None)  # what the points have in common is the rest
        self.model = EntropyProbe(resolved.probe, resolved.seed, resolved.given)
        self.runner = ProbeRunner(**resolved.trainer)
        self.runner.resolved = resolved.mapping

    def _run_subcommand(self, subcommand: str) -> None:
        """Call the runner's method."""
        if subcommand == "sweep":
            self.runner.sweep(self.model, sweep_config(vars(self.config["sweep"]["sweep"])))
        else:
            getattr(self.runner, subcommand)(self.model)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Bad input gives one line on stderr and code 2, a sweep of which points failed one and code 3; `--debug` shows the
    traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"entropy-probe {__version__}")
        return 0
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        with terminated_like_interrupted(), quiet_console():
            ProbeCLI(_shorthands(args) or ["--help"])
    except IncompleteSweepError as error:
        return _fail(error, text_of(error), INCOMPLETE, debug)
    except ProbeError as error:
        return _fail(error, text_of(error), USAGE_ERROR, debug)
    except KeyboardInterrupt as error:
        kept = text_of(error) or "interrupted; everything is restored"
        return _fail(error, kept, TERMINATED if _was_terminated(error) else INTERRUPTED, debug)
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(error, f"out of memory: {text_of(error)}; {MEMORY_REMEDY}", USAGE_ERROR, debug)
        message = f"unexpected {error_text(error)} (--debug shows where)"
        return _fail(error, message, INTERNAL_ERROR, debug)
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM has asked for the end."""


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM (a scheduler's notice) end a command as Ctrl-C does: restored, with a word on what was kept."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return

    def end(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _was_terminated(error: BaseException | None) -> bool:
    """Whether SIGTERM is at the root of an interruption."""
    while error is not None and not isinstance(error, Terminated):
        error = error.__cause__ or error.__context__
    return error is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the machine, did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, (RuntimeError, OSError)) and any(s in text_of(error).lower() for s in signs)


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    """Print one line, or the traceback, and give the exit code."""
    lines = "".join(traceback.format_exception(error)) if debug else ""
    line = f"{lines}entropy-probe: error: {' '.join(message.split())}"
    with suppress(OSError, ValueError):  # nobody listens any more
        print(printable(line).encode("ascii", "backslashreplace").decode(), file=sys.stderr)
    return code


def _shorthands(args: list[str]) -> list[str]:
    """Write out the shorthands.

    `--checkpoint FOLDER`, `--config NAME` for a configuration that is shipped, and, after `sweep`, `--B_E 256,1024` and
    the like for `--sweep.B_E "[256, 1024]"`.
    """
    out = list(args)
    for i, arg in enumerate(out):
        option, equals, value = arg.partition("=")
        following = value if equals else (out[i + 1] if i + 1 < len(out) else "")
        if args[0] == "sweep" and option.startswith("--") and option[2:] in SWEEP_OPTIONS:
            out[i] = f"--sweep.{arg[2:]}"
            if option == "--overwrite" and not equals and following not in ("true", "false"):
                out[i] += "=true"
            elif option[2:] in SWEEP_LISTS and following and following.lstrip()[0] not in "[n-":
                bracketed = f"[{following}]"
                out[i + (not equals)] = f"--sweep.{option[2:]}={bracketed}" if equals else bracketed
        elif option == "--checkpoint" and following and not following.lstrip().startswith("{"):
            out[i] = f"--checkpoint.checkpoint_path={value}" if equals else "--checkpoint.checkpoint_path"
        elif option in ("--config", "-c") and following:
            file = str(find_config_file(following))
            if equals:
                out[i] = f"{option}={file}"
            else:
                out[i + 1] = file
    return out


def _name_list(message: str) -> str:
    r"""The message about a list of numbers in plain words; other messages as they are.

    >>> _name_list("sweep.B_E: expected int or NoneType, found 'x'")
    'sweep.B_E: expected a list of numbers such as "[256, 1024]", found \'x\''
    """
    wrong = re.fullmatch(r"sweep\.(\w+): expected .*?, found (.*)", message)
    if wrong is None or wrong[1] not in SWEEP_LISTS:
        return message
    return (
        f'sweep.{wrong[1]}: expected a list of numbers such as "[{SWEEP_LISTS[wrong[1]]}]", found {wrong[2]}'
    )


class _Printable(logging.Formatter):
    """Keeps what only a terminal would understand out of notes."""

    def format(self, record: logging.LogRecord) -> str:
        """The note."""
        return printable(super().format(record))


@contextmanager
def quiet_console() -> Iterator[None]:
    """Leave stderr to the probe's own notes, progress and errors; libraries' warnings are not the user's to mend."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    package = logging.getLogger("probe")
    names = ("lightning", "transformers", "datasets", "huggingface_hub", "bitsandbytes", "torch")
    libraries = {name: logging.getLogger(name).level for name in names}
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        for name, before in libraries.items():
            logging.getLogger(name).setLevel(before)


if __name__ == "__main__":
    sys.exit(main())
