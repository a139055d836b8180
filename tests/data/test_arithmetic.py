"""The generated arithmetic problems."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest

from probe.data.arithmetic import MAX_ROWS, PROMPT_TEMPLATE, SPLITS, arithmetic_corpus, arithmetic_rows
from probe.data.rewards import exact_number
from probe.errors.exceptions import DataError


def solve(question: str) -> int:
    """The answer, from the question's own words."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if re.search(r"boxes of|on each of", question):
        return numbers[0] * numbers[1]
    total = numbers.pop(0)
    for verb in re.findall(
        r"\b(gets|and then|found|has(?= \d+\. How many together)|loses|gave|takes)\b", question
    ):
        total += -numbers.pop(0) if verb in ("loses", "gave", "takes") else numbers.pop(0)
    assert not numbers
    return total


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right(split):
    for row in arithmetic_rows(split, MAX_ROWS):
        assert set(row) == {"question", "answer"}
        assert row["answer"] == str(solve(row["question"])), row
        assert int(row["answer"]) >= 0


def test_questions_are_distinct_and_splits_disjoint():
    # Different seeds: the split is a property of the question, not of the draw.
    train = [row["question"] for row in arithmetic_rows("train", MAX_ROWS, seed=1)]
    test = [row["question"] for row in arithmetic_rows("test", MAX_ROWS, seed=2)]
    assert len(set(train)) == len(set(test)) == MAX_ROWS
    assert not set(train) & set(test)


def test_rows_depend_on_the_seed_only():
    state = random.getstate()
    assert arithmetic_rows("train", 50) == arithmetic_rows("train", 200)[:50]
    assert arithmetic_rows("train", 50) != arithmetic_rows("train", 50, seed=1)
    assert random.getstate() == state
    code = "from probe.data.arithmetic import arithmetic_rows; print(arithmetic_rows('test', 3))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(arithmetic_rows("test", 3))  # another process has another hash()


def test_corpus_is_of_the_train_split_and_mostly_right():
    corpus = arithmetic_corpus(4000, seed=3)
    assert corpus == arithmetic_corpus(4000, seed=3)
    test = {PROMPT_TEMPLATE.format(prompt=row["question"]) for row in arithmetic_rows("test", MAX_ROWS)}
    assert not test & {prompt for prompt, _ in corpus}
    assert all(completion.startswith(" ") for _, completion in corpus)
    answers = [str(solve(prompt)) for prompt, _ in corpus]
    right = exact_number([], [completion for _, completion in corpus], answer=answers)
    guessed = [bool(re.search(r"I (guess|think|suppose|would say)", completion)) for _, completion in corpus]
    assert all(r for r, g in zip(right, guessed, strict=True) if not g)
    assert sum(guessed) / len(corpus) == pytest.approx(0.3, abs=0.03)
    assert sum(r for r, g in zip(right, guessed, strict=True) if g) < 0.1 * sum(guessed)


def test_corpus_has_many_phrasings_of_a_solution():
    texts = {re.sub(r"\d+", "#", completion) for _, completion in arithmetic_corpus(4000)}
    assert len(texts) > 500


def test_unknown_split():
    with pytest.raises(DataError, match=r"expected the split train or test, found 'validation'"):
        arithmetic_rows("validation")


@pytest.mark.parametrize("size", [0, MAX_ROWS + 1])
def test_impossible_size(size):
    with pytest.raises(DataError, match=rf"expected a size from 1 to {MAX_ROWS} rows, found {size}"):
        arithmetic_rows("train", size)
