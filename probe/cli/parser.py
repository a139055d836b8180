"""The command line: `entropy-probe run`, `demo` and `sweep`, each with `--config FILE`, and `python -m probe`."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from typing import Any

from jsonargparse import ArgumentError, DefaultHelpFormatter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from probe.cli.shorthands import SWEEP_LISTS, name_list
from probe.cli.texts import DESCRIPTION, DESCRIPTIONS, USAGE
from probe.config.explain import explain
from probe.config.files import SHIPPED_CONFIGS, read_config_file, shipped_names
from probe.config.parsing import add_probe_arguments, resolve
from probe.errors.exceptions import ConfigError
from probe.imports import current_directory_importable
from probe.module import EntropyProbe
from probe.runner import ProbeRunner
from probe.sweep.settings import SweepConfig, sweep_config

QUICKSTART = SHIPPED_CONFIGS / "quickstart.yaml"


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
            raise ConfigError(name_list(message)) from error

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
