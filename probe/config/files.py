"""Configuration files: found, bounded and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from probe.config.schema import SECTIONS
from probe.errors.exceptions import ConfigError
from probe.limits import CONFIG_ALIASES, CONFIG_BYTES, CONFIG_DEPTH

SHIPPED_CONFIGS = Path(__file__).parents[1] / "configs"
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
            f"{file}: expected a YAML file, found something that cannot be read: {one_line(error)}"
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
            f"{file}: expected a YAML file, found something that cannot be read: {one_line(error)}"
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


def one_line(error: object) -> str:
    """A message with its line breaks folded."""
    return " ".join(str(error).split())
