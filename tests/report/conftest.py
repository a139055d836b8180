"""A made-up run for the tests of reports."""

from __future__ import annotations

import pytest

from tests.support.runs import number_prompts, run, small_config
from tests.support.synthetic_run import make_state
from tests.support.tiny_models import lora_checkpoint, save_base


@pytest.fixture(scope="module")
def state():
    return make_state(B_E=6, B_U=3, G=4, lengths=(2, 8), layers=2, shape=(2, 3))


@pytest.fixture(scope="session")
def with_attribution(tmp_path_factory):
    """The values of a real run with attribution and all interventions, one of them measured, and a target."""
    folder = tmp_path_factory.mktemp("attributed")
    checkpoint, *_ = lora_checkpoint(folder / "step_60", save_base(folder / "base"))
    return run(
        small_config(checkpoint, number_prompts(folder)),
        attribution={"enabled": True, "blocks": 4, "states": 6, "responses": 3, "top": 4},
        whatif={"enabled": True, "exact": ["positive_advantage"], "target_deltaH": -0.001},
    )
