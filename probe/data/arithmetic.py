"""Generated arithmetic word problems: the built-in data set, and the corpus the demo policy is pre-trained on.

Everything is drawn from the templates in this file and a seed, so that the data set needs no download and is the
same everywhere. A question belongs to `train` or to `test` by a hash of its text: the splits are disjoint whatever
the seeds and sizes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from probe.errors.exceptions import DataError

SPLITS = ("train", "test")
MAX_ROWS = 8192
"""Most distinct questions that a split is asked for; each split has several times as many."""

PROMPT_TEMPLATE = "Question: {prompt}\nAnswer:"
"""The prompt around a question. Completions start with a space, so the two tokenise as they do together."""


def arithmetic_rows(split: str, size: int = 4096, seed: int = 0) -> list[dict[str, str]]:
    """Distinct questions of a split with their answers.

    The first `n` rows are the same for every `size >= n`.

    Args:
        split: `train` or `test`.
        size: number of rows, at most `MAX_ROWS`.
        seed: another seed gives other questions of the same split.

    Returns:
        Rows with the columns `question` and `answer` (the number as text).

    Raises:
        DataError: there is no such split, or it has fewer distinct questions than asked for.

    >>> arithmetic_rows("test", size=1)[0].keys()
    dict_keys(['question', 'answer'])
    """
    if not 1 <= size <= MAX_ROWS:
        raise DataError(f"arithmetic: expected a size from 1 to {MAX_ROWS} rows, found {size}")
    rows: dict[str, dict[str, str]] = {}
    for problem in _problems(split, seed):
        rows.setdefault(problem.question, {"question": problem.question, "answer": str(problem.answer)})
        if len(rows) == size:
            break
    return list(rows.values())


def arithmetic_corpus(
    size: int, seed: int = 0, derailing: float = 0.0, longest: int = 32
) -> list[tuple[str, str]]:
    """Prompts of the train split with completions, worked solutions and guesses, each in one of many phrasings.

    Args:
        size: number of pairs; questions may recur with other phrasings.
        seed: seed of questions and phrasings.
        derailing: share of completions that break off after a random word and go on in random numbers, see `derailed`.
        longest: numbers in these.

    Returns:
        Pairs of a prompt (the question in `PROMPT_TEMPLATE`) and a completion that starts with a space.
    """
    phrasing = random.Random(f"arithmetic/phrasing/{seed}")
    # a stream of its own: the other completions are the same whatever the share
    derailment = random.Random(f"arithmetic/derailment/{seed}")
    problems = _problems("train", seed)
    pairs = []
    for problem, _ in zip(problems, range(size), strict=False):
        completion = solution(problem, phrasing)
        if derailment.random() < derailing:
            completion = derailed(completion, longest, derailment)
        pairs.append((PROMPT_TEMPLATE.format(prompt=problem.question), completion))
    return pairs


def vocabulary_texts() -> list[str]:
    """Texts that together hold every word, number and mark that a prompt or a completion can have."""
    # Any values do for the fields: the lists of words and numbers come in whole beside them.
    fields = {"name": "Tom", "friend": "Tom", "things": "eggs", **dict.fromkeys("abcrs", 0)}
    templates = [PROMPT_TEMPLATE.format(prompt=story.text) for story in _STORIES]
    for phrasings in (_OPENINGS, *_WORKINGS.values(), _CLOSINGS, *_GUESSES):
        templates += phrasings
    words = [*_NAMES, *_THINGS, *range(_LARGEST_NUMBER + 1)]
    return [template.format(**fields) for template in templates] + [f" {word}" for word in words]


@dataclass(frozen=True)
class Story:
    """A kind of question.

    Attributes:
        text: the question with fields for names, things and numbers.
        operation: how its numbers combine; a key of the tables of number ranges and of workings.
    """

    text: str
    operation: str


@dataclass(frozen=True)
class Problem:
    """A question with what its solution needs.

    Attributes:
        story: the template it came from.
        fields: the words and numbers in it, with the intermediate result `s` and the result `r`.
    """

    story: Story
    fields: dict[str, str | int]

    @property
    def question(self) -> str:
        """The text of the question."""
        return self.story.text.format(**self.fields)

    @property
    def answer(self) -> int:
        """The number asked for."""
        return int(self.fields["r"])


def solution(problem: Problem, rng: random.Random) -> str:
    """A completion in a random phrasing: a worked, right solution, or (3 times in 10) a guess that is mostly wrong.

    Guesses give reinforcement learning something to unlearn: a policy that has seen this corpus guesses as often.

    Args:
        problem: the problem to solve.
        rng: source of the phrasing.

    Returns:
        Two short sentences, starting with a space; their last number is the answer given.
    """
    guessed = rng.random() < _GUESSED_SHARE
    parts = _GUESSES if guessed else (_WORKINGS[problem.story.operation], _CLOSINGS)
    return "".join(rng.choice(part) for part in (_OPENINGS, *parts)).format(**problem.fields)


def derailed(completion: str, numbers: int, rng: random.Random) -> str:
    """A completion that loses its thread: its first words, at least one, and then numbers at random.

    Args:
        completion: a text that starts with a space.
        numbers: how many; with as many as a response may have tokens, it never comes to an end.
        rng: source of where it breaks off and of the numbers.

    >>> derailed(" Well, 3 plus 4 is 7.", 3, random.Random(0))
    ' Well, 3 plus 4 24 13 1'
    """
    words = completion.split(" ")[1:]
    kept = words[: rng.randint(1, len(words))]
    drawn = (str(rng.randint(0, _LARGEST_NUMBER)) for _ in range(numbers))
    return "".join(f" {word}" for word in (*kept, *drawn))


def _problems(split: str, seed: int) -> Iterator[Problem]:
    """An endless stream of problems of a split; questions recur."""
    if split not in SPLITS:
        raise DataError(f"arithmetic: expected the split {' or '.join(SPLITS)}, found {split!r}")
    rng = random.Random(f"arithmetic/{split}/{seed}")
    while True:
        problem = _draw(rng)
        if _split_of(problem.question) == split:
            yield problem


def _draw(rng: random.Random) -> Problem:
    """One problem of any split."""
    story = rng.choice(_STORIES)
    name, friend = rng.sample(_NAMES, 2)
    words: dict[str, str | int] = {"name": name, "friend": friend, "things": rng.choice(_THINGS)}
    return Problem(story, {**words, **_numbers(story.operation, rng)})


def _numbers(operation: str, rng: random.Random) -> dict[str, str | int]:
    """Operands `a`, `b`, `c`, intermediate result `s` and result `r`, none of them negative."""
    a, b, c = (rng.randint(2, 7) for _ in range(3))
    if operation == "add":
        return {"a": a, "b": b, "r": a + b}
    if operation == "subtract":
        return {"a": a + b, "b": b, "r": a}
    if operation == "multiply":
        a, b = rng.randint(2, 5), rng.randint(2, 5)
        return {"a": a, "b": b, "r": a * b}
    if operation == "add_add":
        return {"a": a, "b": b, "c": c, "s": a + b, "r": a + b + c}
    c = min(c, a + b)
    return {"a": a, "b": b, "c": c, "s": a + b, "r": a + b - c}


def _split_of(question: str) -> str:
    """The split a question belongs to: one in four is `test`. Python's own `hash` differs between processes."""
    return "test" if hashlib.blake2b(question.encode(), digest_size=1).digest()[0] % 4 == 0 else "train"


_LARGEST_NUMBER = 25

_NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lena", "Max", "Ida", "Leo", "Nora")
_THINGS = ("apples", "books", "coins", "cards", "pens", "stamps", "shells", "cakes", "balls", "eggs")

_STORIES = (
    Story("{name} has {a} {things} and gets {b} more. How many {things} now?", "add"),
    Story("{name} has {a} {things} and {friend} has {b}. How many together?", "add"),
    Story("{name} had {a} {things} and found {b}. How many {things} now?", "add"),
    Story("{name} has {a} {things} and loses {b}. How many are left?", "subtract"),
    Story("{name} had {a} {things} and gave {friend} {b}. How many are left?", "subtract"),
    Story("{a} {things} lie here and {name} takes {b}. How many are left?", "subtract"),
    Story("{name} has {a} boxes of {b} {things}. How many {things} in all?", "multiply"),
    Story("{name} buys {b} {things} on each of {a} days. How many in all?", "multiply"),
    Story("{name} has {a} {things}, gets {b} and loses {c}. How many now?", "add_subtract"),
    Story("{name} had {a} {things}, found {b} and gave {friend} {c}. How many are left?", "add_subtract"),
    Story("{name} has {a} {things}, gets {b} and then {c} more. How many now?", "add_add"),
)

_OPENINGS = (" Well,", " Now,", " OK,", " Let us see:", " We see that")
_WORKINGS = {
    "add": (" {a} plus {b} is {r}.", " {a} and {b} make {r}.", " adding {b} to {a} gives {r}."),
    "subtract": (" {a} minus {b} is {r}.", " {a} less {b} makes {r}.", " taking {b} from {a} leaves {r}."),
    "multiply": (" {a} times {b} is {r}.", " {a} groups of {b} make {r}.", " {b} taken {a} times gives {r}."),
    "add_add": (
        " {a} plus {b} is {s}, plus {c} is {r}.",
        " {a} and {b} make {s}, and {c} more make {r}.",
        " adding {b} gives {s}, adding {c} gives {r}.",
    ),
    "add_subtract": (
        " {a} plus {b} is {s}, minus {c} is {r}.",
        " {a} and {b} make {s}, less {c} makes {r}.",
        " adding {b} gives {s}, taking {c} leaves {r}.",
    ),
}
_CLOSINGS = (
    " So the answer is {r}.",
    " The answer is {r}.",
    " That makes {r} {things}.",
    " This gives {r}.",
    " Answer: {r}.",
)
_GUESSES = (
    (" I guess", " I think", " I suppose", " I would say"),
    (" maybe {a}", " perhaps {a}", " about {a}", " roughly {a}"),
    (" {things}.", " or so.", " in all.", " more or less."),
    (" Who knows.", " That is a guess.", " Hard to say.", " Not sure."),
)
_GUESSED_SHARE = 0.3
