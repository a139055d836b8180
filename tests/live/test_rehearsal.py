"""What is tried when the probe is attached: the longest responses that can occur, so that memory fails at the start."""

from __future__ import annotations

import pytest
import torch

from probe.data.batch import PromptExample
from probe.errors.exceptions import MemoryExhaustedError
from probe.live import WatchSettings
from probe.live.source import SampledSource
from probe.live.step import UpdateProbe
from tests.support import tiny_models
from tests.support.helpers import char_tokenizer, said
from tests.support.little_memory import MESSAGE, forward_mode, longer_than, without_memory_for

PROMPTS = ("three apples", "7 pears and some figs", "one")
LONGEST = len(PROMPTS[1])
NEW = 30


def probe_of(*too_much, **settings):
    """A probe of a tiny model whose first layer has no memory where all of `too_much` hold; and the shapes it saw."""
    model = tiny_models.tiny_model(hidden=16, layers=2).eval()
    shapes = []
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[:2])))
    if too_much:
        without_memory_for(layer, *too_much)
    options = {"B_E": 16, "max_new_tokens": NEW, "microbatch_size": 4, "control_variates": False, **settings}
    prompts = [PromptExample(text, {}, k) for k, text in enumerate(PROMPTS)]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    own = WatchSettings(**options)
    return UpdateProbe(model, parameters, SampledSource(char_tokenizer(), prompts, own), own), shapes


@pytest.mark.parametrize("derivative", ["auto", "finite_difference"])
@pytest.mark.parametrize(
    ("options", "rows"),
    [({}, 4), ({"B_E": 3}, 3), ({"B_E": 3, "target_se": 0.01}, 4)],
)
def test_a_full_microbatch_of_the_longest_responses_is_tried(derivative, options, rows):
    """The last token of a response predicts nothing and is no input."""
    probe_, shapes = probe_of(derivative=derivative, **options)
    probe_.rehearse()
    assert max(length for _, length in shapes) == LONGEST + NEW - 1
    assert shapes[-1] == (rows, LONGEST + NEW - 1)
    assert probe_.way.mode == ("jvp" if derivative == "auto" else derivative)


def test_forward_mode_without_memory_for_long_responses_shows_at_the_start():
    """The few tokens that are sampled when attaching would fit, and so would most responses of the training."""
    probe_, _ = probe_of(forward_mode, longer_than(LONGEST + NEW - 5))
    probe_.rehearse()
    assert probe_.way.mode == "finite_difference"
    assert probe_.way.reason == f"forward mode needs more memory than there is ({MESSAGE})"
    with pytest.raises(MemoryExhaustedError, match="derivative: expected memory for forward mode"):
        attached_in_training(probe_of(forward_mode, longer_than(LONGEST + NEW - 5), derivative="jvp")[0])


def attached_in_training(probe_):
    """The error has the words of a training, as where `watch` rehearses."""
    try:
        probe_.rehearse()
    except MemoryExhaustedError as error:
        error.say_to("training")
        raise


def test_without_memory_for_a_forward_nothing_is_attached():
    probe_, _ = probe_of(longer_than(LONGEST + NEW - 5))
    with pytest.raises(MemoryExhaustedError, match=rf"4 responses of the longest .*, {LONGEST + NEW} tokens"):
        attached_in_training(probe_)


def test_memory_that_is_short_later_changes_the_way_from_then_on(caplog):
    probe_, _ = probe_of()
    probe_.rehearse()
    assert probe_.way.mode == "jvp"
    optimizer = torch.optim.AdamW(list(probe_.parameters.values()), lr=1e-2)
    without_memory_for(probe_.model.model.layers[0].mlp, forward_mode)
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2):
        before = probe_.before(number)
        for p in probe_.parameters.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()
        values = probe_.after(before, [optimizer]).values
        assert values["diagnostics"]["derivative_mode"] == "finite_difference"
        assert "memory" in values["diagnostics"]["derivative_reason"]
    assert said(caplog).count("deltaH1 by finite_difference from here on") == 1
