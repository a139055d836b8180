"""Meetings of processes: shares, sums, and errors that all ranks hear of."""

from __future__ import annotations

import pytest
import torch

from probe.distributed.ranks import ALONE, OtherRankError, Ranks
from probe.errors.exceptions import NumericalError, RanksApartError
from tests.support.trainings import in_processes


def joined() -> Ranks:
    """This process among those of the test."""
    torch.distributed.init_process_group("gloo")
    return Ranks.of_job()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_part_has_one_rank_and_the_load_is_even(size):
    costs = [float(3 + k % 5) for k in range(40)]
    shares = Ranks(0, size).shares(costs)
    assert sorted(part for share in shares for part in share) == list(range(40))
    loads = [sum(costs[part] for part in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)


def test_one_process_meets_nobody():
    assert (ALONE.first, ALONE.size, ALONE.gathered("x", 3), ALONE.sent) == (True, 1, [3], 0)
    total = torch.ones(2)
    ALONE.add_up("x", [total])
    assert total.tolist() == [1, 1]
    with pytest.raises(ValueError, match="own"), ALONE.together("x"):
        raise ValueError("own")
    with ALONE.together("x", [4, 5]) as words:
        pass
    assert words == [[4, 5]]


def exchange(folder):
    ranks = joined()
    sums = [torch.full((3, 2), float(ranks.rank + 1)), torch.full((2,), 10.0**ranks.rank).double()]
    halves = torch.nn.Parameter(torch.full((2,), 0.5 + ranks.rank, dtype=torch.bfloat16))
    ranks.add_up("sums", [*sums, halves])
    own = [0, 0]
    with ranks.together("words", own) as words:
        own[:] = [ranks.rank, 7]
    made = ranks.from_first("made", lambda: {"rank": ranks.rank})
    return [sums, halves.tolist(), words, made, ranks.gathered("names", "abc"[ranks.rank]), ranks.sent]


def test_ranks_exchange_what_they_have(tmp_path):
    for sums, halves, words, made, names, sent in in_processes(3, exchange, tmp_path):
        assert [x.flatten()[0].item() for x in sums] == [6.0, 111.0]
        assert halves == [4.5, 4.5]
        assert words == [[0, 7], [1, 7], [2, 7]]
        assert made == {"rank": 0}
        assert names == list("abc")
        assert sent > 3 * 2 * 4 + 2 * 8 + 2 * 2


class UnsendableError(Exception):
    """An error that cannot be pickled."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


ERRORS = {
    "numbers": lambda: NumericalError("a score is NaN"),
    "memory": lambda: torch.OutOfMemoryError("20 GiB"),
    "unsendable": lambda: UnsendableError(1, 2),
}


def fail(folder, kind, failing):
    """What a rank hears when some fail in a block, and that all can go on."""
    ranks = joined()
    heard = []
    try:
        with ranks.together("outer"), ranks.together("inner"):
            if ranks.rank in failing:
                raise ERRORS[kind]()
    except Exception as error:
        heard = [type(error).__name__, str(error)]
    try:  # outside of the inner block, where others are
        with ranks.together("outer"):
            if ranks.rank in failing:
                raise ERRORS[kind]()
            with ranks.together("inner"):
                pass
            ranks.gathered("after", 1)
    except Exception as error:
        heard += [str(error)]
    return [*heard, ranks.gathered("well", ranks.rank)]


@pytest.mark.parametrize("failing", [[1], [0], [0, 2]])
@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_on_one_rank_is_one_on_all(tmp_path, kind, failing):
    error = ERRORS[kind]()
    for name, text, again, well in in_processes(3, fail, tmp_path, kind, failing):
        assert well == [0, 1, 2]
        if kind != "unsendable":
            assert (name, text) == (type(error).__name__, str(error))
        else:
            assert (name, text) == (OtherRankError.__name__, "UnsendableError: 1 and 2")
        assert again == text


def part(folder):
    ranks = joined()
    try:
        with ranks.together("scores" if ranks.rank == 0 else "gradients"):
            pass
    except RanksApartError as error:
        return str(error)


def test_ranks_that_are_at_different_places_say_so(tmp_path):
    for rank, text in enumerate(in_processes(2, part, tmp_path)):
        assert f"rank {rank} at the end of" in text


def leave(folder):
    ranks = joined()
    if ranks.rank == 1:
        return "gone"
    try:
        with ranks.together("scores"):
            pass
    except RanksApartError as error:
        return str(error)


def test_a_rank_that_has_gone_is_noticed(tmp_path):
    text, _ = in_processes(2, leave, tmp_path)
    assert "another one has gone while they exchanged 'scores'" in text
