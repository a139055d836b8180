"""Everything that goes into the model has a row in its embedding and a position."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from probe.config.batches import GenerationConfig
from probe.data.batch import PromptExample, RolloutBatch
from probe.errors.exceptions import DataError, RolloutError
from probe.rollouts.sampling import sample_rollouts
from probe.scoring import Policy, score_tokens
from probe.scoring.gradients import token_gradients
from probe.scoring.room import Room, check_batch, check_prompts
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import VOCABULARY, tiny_model

MODEL = tiny_model(max_position_embeddings=12)


def batch(prompt=(5, 6), response=(7, 8, 1)) -> RolloutBatch:
    ids = torch.tensor([[7, 1, 0][: len(response)] + [0] * (len(response) - 3), list(response)])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 2:] = False
    return RolloutBatch(
        ("a", "b"), ("c", "d"), ((5,), tuple(prompt)), ids, mask, torch.zeros(2).bool(), torch.arange(2)
    )


WRONG = {
    "a prompt's token": (
        batch(prompt=(5, VOCABULARY)),
        f"found the id {VOCABULARY} in the prompt of sequence 1",
    ),
    "a negative one": (batch(prompt=(-1,)), "found the id -1 in the prompt of sequence 1"),
    "a response's token": (batch(response=(7, 200, 1)), "found the id 200 in the response of sequence 1"),
    "a length": (batch(response=(7,) * 11), "fit into the 12 positions of the model, found 2 and 11 tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_no_pass_takes_what_the_model_has_no_room_for(case):
    wrong, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        score_tokens(Policy(MODEL), wrong)
    with pytest.raises(DataError, match=message):
        token_gradients(Policy(MODEL), wrong, lambda i, t, l, h: (l[None], h[None]), 1)


def test_what_fits_exactly_is_taken():
    check_batch(MODEL, batch(response=(7,) * 10))
    assert bool(score_tokens(Policy(MODEL), batch(response=(7,) * 10)).entropy.isfinite().all())
    padding = replace(batch(), completion_ids=batch().completion_ids.masked_fill(~batch().mask, 10**6))
    check_batch(MODEL, padding)  # what the mask leaves out means nothing
    check_prompts(MODEL, [(5,), (5, 6)], 10)
    assert Room.of(MODEL) == Room(VOCABULARY, 12)


def test_sampling_refuses_before_it_generates(monkeypatch):
    monkeypatch.setattr(MODEL, "generate", lambda **_: pytest.fail("generated"), raising=False)
    for ids, new, error, message in (
        ((5, VOCABULARY), 2, DataError, rf"found the id {VOCABULARY} in prompts\[1\]"),
        ((5,) * 9, 4, RolloutError, "max_new_tokens: expected at most 3 .*12 positions .* prompt 9 tokens"),
    ):
        prompts = [PromptExample("a", {}, 0, ids=(5,)), PromptExample("b", {}, 1, ids=ids)]
        with pytest.raises(error, match=message):
            sample_rollouts(Policy(MODEL), char_tokenizer(), prompts, GenerationConfig(max_new_tokens=new), 0)


def test_models_without_positions_have_no_limit():
    model = SimpleNamespace(config=SimpleNamespace(), get_input_embeddings=lambda: torch.nn.Embedding(4, 2))
    assert Room.of(model) == Room(4, None)
