"""The command line: `entropy-probe run --config FILE`, `entropy-probe demo`, and `python -m probe`."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jsonargparse import ArgumentError
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from probe import __version__
from probe.errors import ConfigError, ProbeError
from probe.module import EntropyProbe
from probe.parsing import SHIPPED_CONFIGS, add_probe_arguments, explain, find_config_file, resolve
from probe.runner import ProbeRunner

USAGE_ERROR = 2
INTERNAL_ERROR = 1
INTERRUPTED = 130


class ProbeCLI(LightningCLI):
    """LightningCLI over `ProbeRunner`'s methods and the sections of the probe's configuration.

    `--help`, `--print_config`, `--config FILE`, `--section.key VALUE` and `class_path` / `init_args` for callbacks
    and loggers work as in any Lightning CLI.
    """

    def __init__(self, args: ArgsType = None) -> None:
        """Parse `args`, build the objects and run the subcommand."""
        demo = {"default_config_files": [str(SHIPPED_CONFIGS / "quickstart.yaml")]}
        super().__init__(
            model_class=EntropyProbe,
            trainer_class=ProbeRunner,  # type: ignore[arg-type]
            save_config_callback=None,  # the resolved configuration is saved with the log files
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": "entropy-probe",
                "description": "Predict and measure what the next update does to a policy's entropy.",
                "exit_on_error": False,
                "run": {"exit_on_error": False},
                "demo": {"exit_on_error": False, **demo},
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of `ProbeRunner`, and the arguments that are not options."""
        return {"run": {"module"}, "demo": {"module"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Nothing: `seed_everything` is part of the probe's schema."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections of the configuration."""
        add_probe_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line.

        Raises:
            ConfigError: an unknown option or key, or a wrong type.
        """
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]
        except (ArgumentError, TypeError, ValueError) as error:
            raise ConfigError(explain(str(error), self._subcommand_parsers["run"])) from error

    def _set_seed(self) -> None:
        """Nothing: a run seeds the global generators itself and puts them back."""

    def instantiate_classes(self) -> None:
        """Build the module and the runner from the parsed configuration."""
        resolved = resolve(self._parser(self.subcommand), self.config[self.subcommand])
        self.model = EntropyProbe(resolved.probe, resolved.seed)
        self.runner = ProbeRunner(**resolved.trainer)
        self.runner.resolved = resolved.mapping

    def _run_subcommand(self, subcommand: str) -> None:
        """Call the runner's method."""
        getattr(self.runner, subcommand)(self.model)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Bad input gives one line on stderr and code 2; `--debug` shows the traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"entropy-probe {__version__}")
        return 0
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        with quiet_console():
            ProbeCLI(_shorthands(args) or ["--help"])
    except ProbeError as error:
        return _fail(error, str(error), USAGE_ERROR, debug)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted; everything is restored", INTERRUPTED, debug)
    except Exception as error:
        return _fail(
            error, f"unexpected {type(error).__name__}: {error} (--debug shows where)", INTERNAL_ERROR, debug
        )
    return 0


def _fail(error: BaseException, message: str, code: int, debug: bool) -> int:
    """Print one line, or the traceback, and give the exit code."""
    if debug:
        traceback.print_exception(error)
    print(f"entropy-probe: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _shorthands(args: list[str]) -> list[str]:
    """Write out two shorthands: `--checkpoint FOLDER`, and `--config NAME` for a configuration that is shipped."""
    out = list(args)
    for i, arg in enumerate(out):
        option, equals, value = arg.partition("=")
        following = value if equals else (out[i + 1] if i + 1 < len(out) else "")
        if option == "--checkpoint" and following and not following.lstrip().startswith("{"):
            out[i] = f"--checkpoint.checkpoint_path={value}" if equals else "--checkpoint.checkpoint_path"
        elif option in ("--config", "-c") and following:
            file = str(find_config_file(following))
            if equals:
                out[i] = f"{option}={file}"
            else:
                out[i + 1] = file
    return out


@contextmanager
def quiet_console() -> Iterator[None]:
    """Leave stderr to the probe's own notes, progress and errors; libraries' warnings are not the user's to mend."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
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
