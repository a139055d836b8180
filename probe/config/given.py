"""Which keys a configuration gives explicitly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from probe.config.schema import ProbeConfig


def given_keys(config: Mapping[str, Any], sections: Iterable[str]) -> frozenset[str]:
    """The keys that a configuration gives, as `section.key`.

    >>> sorted(given_keys({"probe_rework": {"loss": "grpo", "delta": None}, "trainer": None}, ["probe_rework"]))
    ['probe_rework.delta', 'probe_rework.loss']
    """
    found = ((name, config.get(name)) for name in sections)
    return frozenset(
        f"{name}.{key}" for name, section in found if isinstance(section, Mapping) for key in section
    )


def changed_keys(config: ProbeConfig) -> frozenset[str]:
    """The keys whose values are not the defaults: what counts as given where nothing else is known."""
    own, defaults = asdict(config), asdict(ProbeConfig())
    return frozenset(
        f"{section}.{key}"
        for section, keys in own.items()
        for key, value in keys.items()
        if value != defaults[section][key]
    )
