"""Settings of the drop-in probe: every bad one gives one clear line."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from probe.config.batches import GenerationConfig
from probe.errors.exceptions import ConfigError
from probe.live import WatchSettings


def test_defaults_and_generation():
    settings = WatchSettings.of({})
    assert settings == WatchSettings()
    own = WatchSettings.of(
        {
            "max_new_tokens": 7,
            "temperature": 0.5,
            "stop_strings": ["\n"],
            "generation_batch_size": 3,
            "every": 4,
            "budget": 1,  # an integer is a number
        }
    )
    expected = GenerationConfig(
        max_new_tokens=7, temperature=0.5, stop_strings=["\n"], batch_size=3, continuous_batching=False
    )
    assert own.generation == expected
    assert own.generation.top_p == 1
    assert own.generation.top_k == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.every = 3  # type: ignore[misc]


BAD: list[tuple[dict[str, Any], str]] = [
    # unknown
    ({"evry": 3}, "evry: expected a setting of the probe, found an unknown one; did you mean every?"),
    ({"temprature": 1.0}, "found an unknown one; did you mean temperature?"),
    (
        {"b_e": 3},
        "b_e: expected a setting of the probe, found an unknown one; there are every, budget, at_least_every, B_E",
    ),
    # types
    ({"every": True}, "every: expected an integer or None, found True"),
    ({"every": 2.0}, "every: expected an integer or None, found 2.0"),
    ({"every": "10"}, "every: expected an integer or None, found '10'"),
    ({"B_E": False}, "B_E: expected an integer, found False"),
    ({"B_E": 2.5}, "B_E: expected an integer, found 2.5"),
    ({"B_E": None}, "B_E: expected an integer, found None"),
    ({"budget": "5 %"}, "budget: expected a number, found '5 %'"),
    ({"budget": True}, "budget: expected a number, found True"),
    ({"target_se": "small"}, "target_se: expected a number or None, found 'small'"),
    ({"temperature": None}, "temperature: expected a number, found None"),
    ({"stop_strings": "\n"}, "stop_strings: expected a list of texts, found '\\n'"),
    ({"stop_strings": ["a", 3]}, "stop_strings: expected a list of texts, found ['a', 3]"),
    (
        {"derivative": "reverse"},
        "derivative: expected one of 'auto', 'jvp', 'finite_difference', found 'reverse'",
    ),
    ({"noise_floor": True}, "noise_floor: expected one of 'auto', 'on', 'off', found True"),
    ({"shares": 1}, "shares: expected true or false, found 1"),
    ({"strict": "yes"}, "strict: expected true or false, found 'yes'"),
    ({"snapshot_device": 0}, "snapshot_device: expected a text or None, found 0"),
    ({"collapse_entropy": "low"}, "collapse_entropy: expected a number or None, found 'low'"),
    # ranges
    ({"every": 0}, "every: expected an integer of at least 1, or None, found 0"),
    ({"budget": 0}, "budget: expected a share of at most 1, such as 0.05 for 5 %, found 0"),
    ({"budget": 5}, "budget: expected a share of at most 1, such as 0.05 for 5 %, found 5"),
    ({"budget": float("nan")}, "budget: expected a finite number, found nan"),
    ({"B_E": 1}, "B_E: expected an integer of at least 2, found 1"),
    ({"target_se": 0.0}, "target_se: expected a number of nats per token above 0, or None, found 0.0"),
    ({"target_se": -1}, "target_se: expected a number of nats per token above 0, or None, found -1"),
    ({"target_se": float("inf")}, "target_se: expected a finite number, found inf"),
    ({"microbatch_size": 0}, "microbatch_size: expected an integer of at least 1, or auto, found 0"),
    ({"head_chunk_tokens": -1}, "head_chunk_tokens: expected an integer of at least 1, found -1"),
    (
        {"collapse_entropy": 0.0},
        "collapse_entropy: expected a number of nats per token above 0, or None, found 0.0",
    ),
    ({"collapse_fraction": 1.0}, "collapse_fraction: expected a number between 0 and 1, found 1.0"),
    ({"collapse_fraction": 0}, "collapse_fraction: expected a number between 0 and 1, found 0"),
    (
        {"horizon": 0},
        "horizon: expected an integer from 1 to 3000, as far as a forecast looks (50 is the default), found 0",
    ),
    ({"horizon": 3001}, "horizon: expected an integer from 1 to 3000, as far as a forecast looks"),
    ({"horizon": 10**9}, "horizon: expected an integer from 1 to 3000, as far as a forecast looks"),
    ({"window": 2}, "window: expected an integer of at least 3, found 2"),
    ({"seed": -1}, "seed: expected an integer of at least 0, found -1"),
    # those of generation, under the probe's own names
    ({"max_new_tokens": 0}, "max_new_tokens: expected"),
    ({"temperature": 0.0}, "temperature: expected"),
    ({"temperature": float("inf")}, "temperature: expected a finite number, found inf"),
    ({"temperature": float("nan")}, "temperature: expected a finite number, found nan"),
    ({"generation_batch_size": 0}, "generation_batch_size: expected"),
    ({"stop_strings": [""]}, "stop_strings: expected"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(v) for v, _ in BAD])
def test_bad_settings_give_one_clear_line(values, message):
    with pytest.raises(ConfigError) as caught:
        WatchSettings.of(values)
    text = str(caught.value)
    assert "\n" not in text
    assert re.match(rf"{next(iter(values))}: expected", text)
    assert message in text


def test_every_setting_is_documented_and_checked():
    """Each field takes its default and refuses an object of no known type."""
    for field in dataclasses.fields(WatchSettings):
        with pytest.raises(ConfigError, match=rf"^{field.name}: expected .*, found <object"):
            WatchSettings.of({field.name: object()})
        assert WatchSettings.of({field.name: field.default}) == WatchSettings()
