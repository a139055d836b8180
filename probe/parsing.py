"""From YAML, mappings or the command line to checked configuration objects, with one parser for all of them."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from probe.config import ProbeConfig
from probe.errors import ConfigError
from probe.from_checkpoint import given_keys
from probe.imports import current_directory_importable, why_no_class
from probe.limits import CONFIG_ALIASES, CONFIG_BYTES, CONFIG_DEPTH, LARGEST_SEED
from probe.text import shown

set_parsing_settings(docstring_parse_attribute_docstrings=True)

SECTIONS = {f.name: f.default_factory for f in fields(ProbeConfig)}
"""The sections of a configuration and their dataclasses."""
DEFAULT_SEED = 42
SHIPPED_CONFIGS = Path(__file__).parent / "configs"
"""Folder of the configurations that come with the package."""


def _switches() -> dict[str, dict[str, tuple[str, ...]]]:
    """The keys of each section that have `on` or `off` among their values, with these."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, section in SECTIONS.items():
        for key, hint in get_type_hints(section).items():
            words = tuple(word for word in ("on", "off") if word in get_args(hint))
            if get_origin(hint) is Literal and words:
                found.setdefault(name, {})[key] = words
    return found


_SWITCHES = _switches()


def with_words(content: Any) -> Any:
    """The content of a YAML file, with `on` and `off` where they are values of a key; YAML reads them as truth values.

    >>> with_words({"probe_rework": {"curvature": False, "update_spread": False}})
    {'probe_rework': {'curvature': 'off', 'update_spread': False}}
    """
    if not isinstance(content, Mapping):
        return content
    found = dict(content)
    for name, keys in _SWITCHES.items():
        if isinstance(found.get(name), Mapping):
            section = dict(found[name])
            for key, words in keys.items():
                word = {"True": "on", "False": "off"}.get(repr(section.get(key)))
                if word in words:
                    section[key] = word
            found[name] = section
    return found


_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: with_words(_load_yaml(text)), (yaml.YAMLError,))


@dataclass(frozen=True)
class ResolvedConfig:
    """A checked configuration.

    Attributes:
        probe: the sections.
        trainer: arguments of `ProbeRunner`.
        seed: master seed.
        mapping: everything as plain types, defaults filled in: what is saved with the results.
        given: the keys that were given explicitly, as `section.key`.
    """

    probe: ProbeConfig
    trainer: dict[str, Any]
    seed: int
    mapping: dict[str, Any]
    given: frozenset[str]


def add_probe_arguments(parser: LightningArgumentParser) -> None:
    """Add every section of the schema, `trainer` and `seed_everything` to a parser."""
    from probe.runner import ProbeRunner  # imports the module, which needs this package's configuration first

    parser.add_argument(
        "--seed_everything",
        type=bool | int,
        default=DEFAULT_SEED,
        help="Master seed of the batches; true takes a random one.",
    )
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    parser.add_class_arguments(ProbeRunner, "trainer", instantiate=False, sub_configs=True)


def parse_config(config: Mapping[str, Any]) -> ResolvedConfig:
    """Check a configuration given as mappings.

    Args:
        config: sections as mappings; a missing section or key has its default.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a wrong type or an impossible value.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"expected a mapping with sections such as `checkpoint:`, found {type(config).__name__}"
        )
    for name in [*SECTIONS, "trainer"]:
        if not isinstance(config.get(name) or {}, Mapping):
            raise ConfigError(f"{name}: expected a mapping of keys, found {type(config[name]).__name__}")
    parser = LightningArgumentParser(exit_on_error=False)
    add_probe_arguments(parser)
    given = with_words({key: value for key, value in config.items() if value is not None})
    try:
        with current_directory_importable():
            namespace = parser.parse_object(given)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(explain(str(error), parser)) from error
    return resolve(parser, namespace, given)


def resolve(
    parser: LightningArgumentParser, namespace: Namespace, given: Mapping[str, Any]
) -> ResolvedConfig:
    """Build the objects of a parsed configuration.

    Args:
        parser: that parsed it.
        namespace: the configuration, defaults filled in.
        given: the configuration without them, sections as mappings.

    Raises:
        ConfigError: an impossible value.
    """
    seed = _resolve_seed(namespace)
    mapping = yaml.safe_load(parser.dump(namespace, skip_unset=False, format="yaml"))
    for option in ("config", "debug"):  # of the command line, not of the probe
        mapping.pop(option, None)
    try:
        with current_directory_importable():
            objects = parser.instantiate(namespace)
    except ConfigError:
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(explain(str(error), parser)) from error
    probe = ProbeConfig(**{name: objects[name] for name in SECTIONS})
    trainer = (
        dict(objects["trainer"].items())
        if isinstance(objects["trainer"], Namespace)
        else dict(objects["trainer"])
    )
    keys = given_keys(given, SECTIONS)
    return ResolvedConfig(probe=probe, trainer=trainer, seed=seed, mapping=mapping, given=keys)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The content of a YAML configuration file, or of the shipped configuration of that name.

    Raises:
        ConfigError: the file is missing or not a YAML mapping.
    """
    file = find_config_file(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{file}: expected a YAML file, found something that cannot be read: {_one_line(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file}: expected a mapping with sections such as `checkpoint:`, found {type(content).__name__}"
        )
    return content


def find_config_file(path: str | Path) -> Path:
    """The file at `path`, or the shipped configuration of that name.

    Raises:
        ConfigError: there is neither, or the file is not one that can be parsed safely.
    """
    file = Path(path).expanduser()
    if file.is_file():
        _check_yaml(file)
        return file
    shipped = SHIPPED_CONFIGS / f"{file.name.removesuffix('.yaml')}.yaml"
    # Under `configs/` they lie in a clone of the repository; elsewhere that is how documentation names them.
    if Path(path) in (Path(file.name), Path("configs") / file.name) and shipped.is_file():
        return shipped
    names = ", ".join(shipped_names())
    raise ConfigError(
        f"configuration: expected a YAML file, or one of the shipped configurations ({names}), found no {path}"
    )


def _check_yaml(file: Path) -> None:
    """Go through a YAML file event by event, before a parser builds anything from it.

    Raises:
        ConfigError: it cannot be read, is beyond the limits of `probe.limits`, or has a key twice, of which parsers
            keep the last one without a word.
    """
    try:
        if file.stat().st_size > CONFIG_BYTES:
            raise ConfigError(
                f"{file}: expected a YAML file of at most {CONFIG_BYTES} bytes, found {file.stat().st_size}"
            )
        text = file.read_text(encoding="utf-8")
        _check_events(file, yaml.parse(text, Loader=yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{file}: expected a YAML file, found something that cannot be read: {_one_line(error)}"
        ) from error


def _check_events(file: Path, events: Iterable[yaml.Event]) -> None:
    """See `_check_yaml`."""
    aliases = 0
    nested: list[set[str] | None] = []  # the keys of each mapping around, None for a list
    at_key: list[bool] = []
    for event in events:
        inside = bool(nested) and nested[-1] is not None
        starts = isinstance(event, yaml.CollectionStartEvent)
        if isinstance(event, yaml.CollectionEndEvent):
            nested.pop(), at_key.pop()
        elif starts or isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent)):
            if inside and at_key[-1] and isinstance(event, yaml.ScalarEvent):
                keys: set[str] = nested[-1]  # type: ignore[assignment]
                if event.value in keys:
                    mark: Any = event.start_mark
                    line = mark.line + 1
                    raise ConfigError(
                        f"{file}, line {line}: expected every key once, found {event.value} again"
                    )
                keys.add(event.value)
            if inside:
                at_key[-1] = not at_key[-1]
        if starts:
            nested.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
            at_key.append(True)
        aliases += isinstance(event, yaml.AliasEvent)
        if len(nested) > CONFIG_DEPTH:
            raise ConfigError(f"{file}: expected at most {CONFIG_DEPTH} levels of nesting, found more")
        if aliases > CONFIG_ALIASES:
            raise ConfigError(f"{file}: expected at most {CONFIG_ALIASES} uses of anchors, found more")


def shipped_names() -> list[str]:
    """The names of the configurations that come with the package."""
    return sorted(path.stem for path in SHIPPED_CONFIGS.glob("*.yaml"))


def explain(message: str, parser: LightningArgumentParser) -> str:
    """One line from jsonargparse's message: `key: expected ..., found ...`, or the nearest key to an unknown one."""
    text = _one_line(message)
    of_class = _class_path_problem(text)
    if of_class is not None:
        return of_class
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
    if in_group is not None:
        return _unknown_key(".".join(in_group.groups()), parser)
    alone = re.search(
        r"(?:Option|Subcommand '\w+' does not accept option) '([\w.]+)'|[Uu]nrecognized arguments?: --([\w.]+)",
        text,
    )
    if alone is not None:
        return _unknown_key(alone.group(1) or alone.group(2), parser)
    wrong = re.match(r"Parser key \"([\w.]+)\": (.*)", text)
    if wrong is None:
        return text
    key, rest = wrong.groups()
    expected = list(
        dict.fromkeys(
            _plain_type(e)
            for e in re.findall(r"Expected an? (.*?)(?:\.? Got value| Given value| - |\. |$)", rest)
        )
    )
    found = re.search(r".*(?:Got|Given) value: (.*)$", rest)
    if not expected or found is None:
        return f"{key}: {rest}"
    return f"{key}: expected {' or '.join(expected)}, found {found.group(1)!r}"


def _class_path_problem(text: str) -> str | None:
    """What is wrong with a class under `trainer.callbacks` or `trainer.logger`; None where it is something else."""
    raised = re.match(r"Does not validate against any of the Union subtypes .*?Errors: - (.*?) - ", text)
    if raised is not None:  # by the class's own `__init__`
        return f"trainer: a class of callbacks or logger cannot be made: {raised.group(1)}"
    wrong = re.match(r'Parser key "(trainer\.(?:callbacks|logger))": (.*)', text)
    if wrong is None:
        return None
    key, rest = wrong.groups()
    named = re.findall(r"'class_path': '([^']*)'", rest)
    named += re.findall(r"Given value: ([A-Za-z_]\w*(?:\.\w+)*)$", rest)
    for path in dict.fromkeys(named):
        reason = why_no_class(path, _base_class(key))
        if reason is not None:
            return f"{key}: {reason}"
    argument = re.search(r"Problem with given class_path '([\w.]+)': (.*?)(?: - |$)", rest)
    if argument is None:
        return None
    unknown = re.search(r"Option '([\w.]+)' is not accepted", argument.group(2))
    if unknown is not None:
        return f"{key}: {argument.group(1)} has no argument {unknown.group(1)!r}"
    found = re.match(r'Parser key "([\w.]+)": (.*)', argument.group(2))
    return f"{key}: {argument.group(1)}: {': '.join(found.groups()) if found else argument.group(2)}"


def _base_class(key: str) -> type:
    """The class from which what stands under `trainer.callbacks` or `trainer.logger` is derived."""
    from lightning.fabric.loggers import Logger

    from probe.callbacks.base import ProbeCallback

    return ProbeCallback if key == "trainer.callbacks" else Logger


def _unknown_key(key: str, parser: LightningArgumentParser) -> str:
    """Name the nearest valid key."""
    keys = [k for k in vars(parser.get_defaults().as_flat()) if "." in k or k == "seed_everything"]
    leaves = {k.rsplit(".", 1)[-1]: k for k in keys}
    leaf = key.rsplit(".", 1)[-1]
    same = {name.lower(): k for name, k in leaves.items()}.get(leaf.lower())
    near = [same] if same is not None else difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not near:  # a misspelt name in the wrong section
        near = [leaves[n] for n in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.6)]
    hint = f"did you mean {near[0]}?" if near else f"the sections are {', '.join([*SECTIONS, 'trainer'])}"
    return f"{key}: unknown configuration key; {hint}"


def _plain_type(name: str) -> str:
    """`int` for `<class 'int'>`, `'a' or 'b'` for `typing.Literal['a', 'b']`."""
    name = re.sub(r"<class '([\w.]+)'>", r"\1", name).strip()
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", name)
    return choices.group(1).replace(", ", " or ") if choices else name


def _resolve_seed(namespace: Namespace) -> int:
    """The master seed, written back so that the saved configuration reproduces the run."""
    seed = namespace["seed_everything"]
    if seed is True:
        seed = random.SystemRandom().randrange(2**31)
    elif seed is None or seed is False:
        seed = DEFAULT_SEED
    if seed < 0:
        raise ConfigError(f"seed_everything: expected an integer of at least 0, found {shown(seed, 200)}")
    if seed > LARGEST_SEED:
        raise ConfigError(
            f"seed_everything: expected an integer of at most {LARGEST_SEED}, found {shown(seed, 200)}"
        )
    namespace["seed_everything"] = seed
    return int(seed)


def _one_line(error: object) -> str:
    """A message with its line breaks folded."""
    return " ".join(str(error).split())
