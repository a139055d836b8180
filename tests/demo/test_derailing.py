"""A demo policy that derails now and then, and the benchmark that judges intervals on it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.derailing import main, truth_of
from probe.data.arithmetic import arithmetic_corpus
from probe.demo import DemoRecipe
from tests.support.tabular import tabular

TINY = DemoRecipe(
    hidden_size=32,
    intermediate_size=32,
    layers=1,
    corpus_size=512,
    pretrain_steps=60,
    grpo_steps=2,
    prompts_per_step=4,
    group_size=4,
    evaluation_prompts=8,
    derailing=0.1,
)


def test_some_texts_go_on_in_numbers():
    """The share asked for, from the first word on or later, past the cap; the other texts are as without."""
    plain, mixed = arithmetic_corpus(2000, seed=3), arithmetic_corpus(2000, seed=3, derailing=0.1, longest=20)
    assert arithmetic_corpus(2000, seed=3, derailing=0.0) == plain
    changed = [(old, new) for old, new in zip(plain, mixed, strict=True) if old != new]
    assert 0.07 < len(changed) / len(plain) < 0.13
    for (prompt, completion), (same_prompt, broken) in changed:
        assert prompt == same_prompt
        words, numbers = broken.split(" ")[:-20], broken.split(" ")[-20:]
        assert all(number.isdigit() for number in numbers)
        assert len(words) > 1  # the first is empty: completions start with a space
        assert completion.split(" ")[: len(words)] == words


def test_the_truth_from_pools_is_that_of_an_enumeration():
    """Within four of its standard errors, by every way; two pools together know more than one."""
    space, g = tabular("branch", 0.05), torch.Generator().manual_seed(1)
    rows, again = (
        torch.multinomial(p, 8000, replacement=True, generator=g)
        for p in (space.probability, space.new_probability)
    )
    fresh = space.taken(again)
    truth = truth_of(space.taken(rows), (fresh.old, fresh.new))
    pairs = [(truth.slope, space.slope), (truth.residual, space.slope - space.change)]
    pairs += [(pair, space.change) for pair in (truth.change, *truth.by.values())]
    for pair, exact in pairs:
        for (value, se), number in zip(pair, exact.tolist(), strict=True):
            assert abs(value - number) < 4 * se
            assert se < max(0.1 * abs(number), 0.05)
    for which in (0, 1):
        assert truth.change[which][1] < min(truth.by[way][which][1] for way in ("forward", "backward"))


@pytest.mark.filterwarnings("ignore")
def test_the_tables_are_printed_and_kept_pools_used_again(tmp_path, capsys):
    """Every part runs; what is random is fixed, and a second run makes nothing."""
    arguments = [
        *("--responses", "150", "--sizes", "64", "--repetitions", "5"),
        *("--cache", str(tmp_path / "cache")),
    ]
    main(arguments, TINY, B_U=4, G=4)
    first, made = capsys.readouterr()
    assert "| derailing 1/" in first
    assert "| 64 | per_decision+cv |" in first
    assert " | 2 | " in first.splitlines()[-3]  # as many E's as share no response
    assert made.count(".safetensors: ") == 2
    main(arguments, TINY, B_U=4, G=4)
    again, made = capsys.readouterr()
    assert ".safetensors: " not in made
    assert first.splitlines()[:-1] == again.splitlines()[:-1]  # the last line is of time and memory
