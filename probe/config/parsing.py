"""From YAML, mappings or the command line to checked configuration objects, with one parser for all of them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    Namespace,
    get_loader,
    set_loader,
    set_parsing_settings,
)

from probe.config.explain import explain
from probe.config.files import with_words
from probe.config.given import given_keys
from probe.config.schema import SECTIONS, ProbeConfig
from probe.errors.exceptions import ConfigError
from probe.imports import current_directory_importable
from probe.limits import LARGEST_SEED
from probe.text import shown

set_parsing_settings(docstring_parse_attribute_docstrings=True)

DEFAULT_SEED = 42
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


def add_probe_arguments(parser: ArgumentParser, trainer: type) -> None:
    """Add every section of the schema, `trainer` and `seed_everything` to a parser.

    Args:
        parser: what they are added to.
        trainer: `TrainerConfig` of the classes that callbacks and loggers are derived from.
    """
    parser.add_argument(
        "--seed_everything",
        type=bool | int,
        default=DEFAULT_SEED,
        help="Master seed of the batches; true takes a random one.",
    )
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    parser.add_class_arguments(trainer, "trainer", instantiate=False, sub_configs=True)


def parse_config(config: Mapping[str, Any], trainer: type) -> ResolvedConfig:
    """Check a configuration given as mappings.

    Args:
        config: sections as mappings; a missing section or key has its default.
        trainer: see `add_probe_arguments`.

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
    parser = ArgumentParser(exit_on_error=False)
    add_probe_arguments(parser, trainer)
    given = with_words({key: value for key, value in config.items() if value is not None})
    try:
        with current_directory_importable():
            namespace = parser.parse_object(given)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(explain(str(error), parser)) from error
    return resolve(parser, namespace, given)


def resolve(parser: ArgumentParser, namespace: Namespace, given: Mapping[str, Any]) -> ResolvedConfig:
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
    trainer = dict(objects["trainer"].items())
    keys = given_keys(given, SECTIONS)
    return ResolvedConfig(probe=probe, trainer=trainer, seed=seed, mapping=mapping, given=keys)


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
