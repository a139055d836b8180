"""Where memory does not suffice: forward mode gives way to differences of forwards, and these to one clear line."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from probe.errors.exceptions import MemoryExhaustedError, NumericalError
from probe.errors.memory import OutOfMemory, is_out_of_memory, unless_out_of_memory
from probe.phases.passes import AlongStep, StepOnBatch, Way, along_step, choose_way, tangents_of
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenTangents
from tests.support.enumerable import all_sequences, tiny_policy
from tests.support.exact import random_step
from tests.support.helpers import said
from tests.support.little_memory import MESSAGE, backward, forward_mode, without_memory_for

JVP, DIFFERENCES = Way("jvp", "as told"), Way("finite_difference", "as told")


def little_memory(monkeypatch, *too_much):
    policy = tiny_policy(monkeypatch, layers=2)
    without_memory_for(policy.model.get_base_model().model.layers[0].mlp, *too_much)
    return policy, all_sequences(cap=2)


@pytest.mark.parametrize("what", [forward_mode, backward])
@pytest.mark.parametrize("otherwise", ["reverse", "finite_difference"])
def test_auto_takes_differences_where_there_is_no_memory(monkeypatch, what, otherwise):
    policy, batch = little_memory(monkeypatch, what)
    way = choose_way(policy, batch, "auto", otherwise)
    assert way.mode == "finite_difference"
    assert "memory" in way.reason
    assert MESSAGE in way.reason


def test_forward_mode_that_is_asked_for_says_what_to_do(monkeypatch):
    policy, batch = little_memory(monkeypatch, forward_mode)
    with pytest.raises(MemoryExhaustedError) as caught:
        choose_way(policy, batch, "jvp")
    found = str(caught.value)
    for part in (
        MESSAGE,
        "probe_rework.derivative_mode: expected memory",
        "head_chunk_tokens",
        "finite_difference",
    ):
        assert part in found
    caught.value.say_to("training")
    assert "probe_rework" not in str(caught.value)


def test_differences_take_the_place_of_forward_mode(monkeypatch):
    """The numbers are those of differences that were asked for, and the reason says why they are there."""
    policy, batch = little_memory(monkeypatch, forward_mode)
    on = StepOnBatch(policy, batch, random_step(policy, 1e-2))
    found, expected = along_step(on, JVP), along_step(on, DIFFERENCES)
    assert found.way.mode == "finite_difference"
    assert found.way.reason == f"forward mode needs more memory than there is ({MESSAGE})"
    assert torch.equal(found.tangents.entropy, expected.tangents.entropy)
    assert torch.equal(found.tangents.logprob, expected.tangents.logprob)
    assert float(found.tangents.entropy.abs().max()) > 0
    with pytest.raises(MemoryExhaustedError, match="expected memory for forward mode"):
        along_step(on, JVP, binding=True)


@pytest.mark.parametrize("way", [JVP, DIFFERENCES])
def test_without_memory_for_forwards_one_line_says_what_to_do(monkeypatch, way):
    policy, batch = little_memory(monkeypatch)
    with pytest.raises(
        MemoryExhaustedError, match=r"forwards of 13 responses.*lower memory_config\.head_chunk_tokens"
    ):
        along_step(StepOnBatch(policy, batch, random_step(policy, 1e-2)), way)


def test_derivatives_of_another_batch_give_way_too(monkeypatch, caplog):
    policy, batch = little_memory(monkeypatch, forward_mode)
    direction = random_step(policy, 1e-2)
    scores = score_tokens(policy, batch)
    by_forward_mode, by_differences = (
        AlongStep(scores, TokenTangents(scores.logprob, scores.entropy), way) for way in (JVP, DIFFERENCES)
    )
    found = tangents_of(policy, batch, direction, by_forward_mode, 1e-2)
    expected = tangents_of(policy, batch, direction, by_differences, 1e-2)
    assert torch.equal(found.entropy, expected.entropy)
    assert "memory" in said(caplog)
    with pytest.raises(MemoryExhaustedError):
        tangents_of(policy, batch, direction, by_forward_mode, 1e-2, binding=True)


def test_the_policy_is_as_before(monkeypatch):
    policy, batch = little_memory(monkeypatch, forward_mode)
    before = score_tokens(policy, batch)
    held = [(m, dict(vars(m))) for m in policy.model.modules()]
    along_step(StepOnBatch(policy, batch, random_step(policy, 1e-2)), JVP)
    assert torch.equal(score_tokens(policy, batch).logprob, before.logprob)
    assert all(vars(m)[key] is value for m, own in held for key, value in own.items())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(MESSAGE),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"
        ),
    ],
)
def test_memory_that_does_not_suffice_is_known(error):
    kept = []

    def run():
        held = torch.zeros(3)
        kept.append(weakref.ref(held))
        raise error

    assert is_out_of_memory(error)
    found = unless_out_of_memory(run)
    assert isinstance(found, OutOfMemory)
    assert found
    error.__traceback__ = None  # the parameter of the test; one that a device raises goes with its frames
    gc.collect()
    assert kept[0]() is None


def test_other_errors_pass():
    def run():
        raise NumericalError("not finite")

    with pytest.raises(NumericalError):
        unless_out_of_memory(run)
    assert unless_out_of_memory(lambda: 3) == 3
