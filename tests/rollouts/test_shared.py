"""Whether responses of E are the update's own is a matter of their places, not of equal texts."""

from __future__ import annotations

import json

import pytest
import torch

from probe.config.batches import BatchConfig
from probe.errors.exceptions import DataError
from probe.rollouts.read import read_rollouts
from probe.rollouts.shared import check_different_files, shared_responses
from tests.support.helpers import char_tokenizer

UPDATE = {"p": ["abc", "abd", "aaa", "cab"], "q": ["bbb", "bca", "abc", "aab"]}


@pytest.fixture
def batch(tmp_path):
    def batch(responses, group=None):
        rows = [{"prompt": p, "completion": c} for p, own in responses for c in own]
        if group is not None:
            rows = [{**row, "group": g} for row, g in zip(rows, group, strict=True)]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_rollouts(str(path), char_tokenizer(), BatchConfig(), 9)

    return batch


def shared(E, U, nats=5.0):
    return shared_responses(E, U, torch.full((len(E),), -nats, dtype=torch.float64))


NAMED = [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("responses", "group", "expected"),
    [
        (UPDATE, NAMED, 8),
        ({"q": UPDATE["q"]}, [1] * 4, 4),
        ({"q": UPDATE["q"]}, None, 4),
        ({**UPDATE, "r": ["abc", "abd"]}, None, 8),
        ({"p": UPDATE["p"][:2], "q": UPDATE["q"][:2]}, None, 4),
        ({"p": UPDATE["p"][::-1]}, None, 4),
        ({"p": UPDATE["p"]}, [7] * 4, 0),  # another draw of the prompt
        ({"r": UPDATE["p"], "s": UPDATE["q"]}, None, 0),  # other prompts
        ({"p": ["abc", "x", "y", "z"], "q": ["u", "bca"]}, None, 0),  # a few that are the same
        ({"p": ["abc"]}, None, 0),
        # others beside the update's own, before them and in their place
        ({"p": ["zzz", "xyz", *UPDATE["p"]], "q": ["zyx", "yyy", *UPDATE["q"]]}, None, 8),
        ({"p": [*UPDATE["p"][:3], "zzz"], "q": [*UPDATE["q"][:3], "yyy"]}, NAMED, 6),
    ],
)
def test_groups_of_the_update_are_known_by_prompt_name_and_places(batch, responses, group, expected):
    U = batch(list(UPDATE.items()), None if group is None else NAMED)
    assert shared(batch(list(responses.items()), group), U) == expected


def test_a_file_without_names_of_groups_is_compared_by_prompts(batch):
    named, plain = batch(list(UPDATE.items()), NAMED), batch(list(UPDATE.items()))
    assert shared(named, plain) == shared(plain, named) == 8


def test_likely_responses_agree_by_chance(batch):
    U = batch(list(UPDATE.items()))
    assert shared(U, U, nats=0.1) == 0
    assert shared(U, U, nats=3.0) == 8


def test_what_is_said_often_agrees_by_chance_whatever_the_policy_thinks_of_it(batch):
    U = batch([("p", ["a"] * 4), ("q", ["b"] * 4)])
    assert shared(batch([("p", ["a"] * 9), ("q", ["b"] * 9)]), U, nats=50.0) == 0


def test_texts_that_do_not_lead_back_to_their_tokens_tell_nothing(batch):
    U = batch([(p, [f"{text}\ufffd" for text in own]) for p, own in UPDATE.items()])
    assert shared(U, U) == 0


def test_sampled_batches_share_nothing(batch):
    U = batch(list(UPDATE.items()))
    sampled = U.__class__(**{**vars(U), "places": ()})
    assert shared(sampled, U) == shared(U, sampled) == 0


def test_one_file_for_both_is_refused_by_any_of_its_names(tmp_path):
    folder = tmp_path / "completions"
    folder.mkdir()
    file = folder / "completions_00003.parquet"
    file.touch()
    (tmp_path / "other.jsonl").touch()
    for E in (folder, file, folder / ".." / "completions" / file.name):
        with pytest.raises(
            DataError, match=r"the file of batch_config\.U_rollouts; leave it out to sample E"
        ):
            check_different_files(str(E), str(folder), 3)
    check_different_files(str(tmp_path / "other.jsonl"), str(folder), 3)
    (tmp_path / "run.json.gz").touch()  # a log has parts of its own for both
    check_different_files(str(tmp_path / "run.json.gz"), str(tmp_path / "run.json.gz"), None)
