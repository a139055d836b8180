"""The processes that share a run: who takes which part, and the meetings in which they exchange what they found.

All processes ("ranks") hold the whole batch and do all arithmetic on gathered numbers alike; only passes over the model
are shared out. Every meeting begins with a word of each rank on whether it is well. So an error on one rank becomes the
same error on all, at the same place, and what follows from it (another way to differentiate where memory does not
suffice) is done by all.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from probe.errors.exceptions import RanksApartError
from probe.shards import MEETING
from probe.text import first_line

T = TypeVar("T")
BUCKET = 2**24
"""Most numbers that are summed over ranks at a time; a larger tensor goes in pieces."""
WORDS = 4
"""Most numbers that a rank can add to its word at a meeting."""


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes; 0 and 1 where training is not distributed."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


class OtherRankError(RuntimeError):
    """What another rank has raised, where it cannot be sent as it is."""


@dataclass(eq=False)
class Ranks:
    """This process among those that share a run.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        group: of `torch.distributed`, for tensors on the CPU; None is the default group.
        sent: bytes that this rank has handed to collectives: sums once, what is gathered or told once.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, repr=False)
    sent: int = 0

    @classmethod
    def of_job(cls, seconds: float = 600.0, patience: timedelta | None = None) -> Ranks:
        """All processes of the job, with a group of their own for tensors on the CPU; alone where there is one.

        Args:
            seconds: that they wait for each other here.
            patience: how long one waits for another at a meeting; None for as long as torch does.

        Raises:
            RanksApartError: not all of them ask for it.
        """
        rank, size = rank_and_size()
        if size == 1:
            return cls()
        _wait_for_all(rank, size, seconds)
        return cls(rank, size, torch.distributed.new_group(backend="gloo", timeout=patience))

    @property
    def first(self) -> bool:
        """Whether this is the rank that publishes."""
        return self.rank == 0

    def shares(self, costs: Sequence[float]) -> list[list[int]]:
        """Which parts each rank takes: the costliest first, each to the rank that has least to do.

        Args:
            costs: of each part.

        >>> Ranks(0, 2).shares([3, 1, 1, 1])
        [[0], [1, 2, 3]]
        """
        taken: list[list[int]] = [[] for _ in range(self.size)]
        load = [0.0] * self.size
        for part in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            least = min(range(self.size), key=lambda rank: (load[rank], rank))
            taken[least].append(part)
            load[least] += costs[part]
        return [sorted(parts) for parts in taken]

    @contextmanager
    def together(self, what: str, words: Sequence[int] = ()) -> Iterator[list[list[int]]]:
        """Run a block on every rank, and meet at its end.

        Args:
            what: is done; must be the same on all ranks.
            words: up to `WORDS` whole numbers of each rank, exchanged with the rest; they may be changed in the block.

        Yields:
            A list; after the block it has the words of each rank, in the order of the ranks, also where a rank failed.

        Raises:
            Exception: what the block raised on the first rank on which it raised.
            RanksApartError: another rank is at another place, or has gone.
        """
        found: list[list[int]] = []
        outer = MEETING.get()
        if self.size > 1:
            MEETING.set(self.meet)
        try:
            yield found
        except Exception as error:
            if not _was_shared(error):
                self._meet(what, words, found, error)
            raise
        finally:
            MEETING.set(outer)
        self._meet(what, words, found, None)

    def meet(self, what: str) -> None:
        """Meet the others; raise what one of them has raised."""
        self._meet(what, (), [], None)

    def _meet(self, what: str, words: Sequence[int], found: list[list[int]], error: Exception | None) -> None:
        """Exchange how each rank is, and its words; raise what another rank has raised."""
        if self.size == 1:
            found[:] = [list(words)]
            return
        # every meeting sends as much, so that a rank that has failed meets the others wherever they are
        own = torch.zeros(2 + WORDS, dtype=torch.int64)
        own[: 2 + len(words)] = torch.tensor([zlib.crc32(what.encode()), int(error is not None), *words])
        heads = [torch.empty_like(own) for _ in range(self.size)]
        with self._collective(what, own.nbytes):
            torch.distributed.all_gather(heads, own, group=self.group)
        found[:] = [head[2 : 2 + len(words)].tolist() for head in heads]
        failed = [rank for rank, head in enumerate(heads) if bool(head[1])]
        if failed:
            errors = self._gathered(what, pickle.dumps(None if error is None else _sendable(error)))
            raised = pickle.loads(errors[failed[0]])  # of this job's own making
            if type(raised) is type(error) and self.rank == failed[0]:
                raised = error
            raised.__dict__.update(shared_by_ranks=True)
            if raised is error:
                return
            raise raised from error
        places = {int(head[0]) for head in heads}
        if len(places) > 1:
            raise RanksApartError(
                f"expected all {self.size} ranks at one place, found rank {self.rank} at the end of {what!r} and "
                "others elsewhere; ranks must run the same version on the same files, on processors of one kind"
            )

    def gathered(self, what: str, value: T) -> list[T]:
        """What each rank has, in the order of the ranks; small Python objects and tensors on the CPU.

        Raises:
            Exception: on another rank it cannot be sent.
            RanksApartError: another rank has gone.
        """
        if self.size == 1:
            return [value]
        with self.together(what):
            own = pickle.dumps(value)
        return [pickle.loads(data) for data in self._gathered(what, own)]

    def _gathered(self, what: str, own: bytes) -> list[bytes]:
        """What each rank has pickled."""
        values: list[Any] = [None] * self.size
        with self._collective(what, len(own)):
            torch.distributed.all_gather_object(values, own, group=self.group)
        return values

    def from_first(self, what: str, make: Callable[[], T]) -> T:
        """What the first rank makes; the others wait for it.

        Args:
            what: is made.
            make: called on the first rank only.

        Raises:
            Exception: what `make` raises.
            RanksApartError: another rank has gone.
        """
        if self.size == 1:
            return make()
        sent: list[Any] = [None]
        with self.together(what):
            if self.first:
                sent[0] = pickle.dumps(make())
        with self._collective(what, len(sent[0]) if self.first else 0):
            torch.distributed.broadcast_object_list(sent, src=0, group=self.group)
        return pickle.loads(sent[0])  # type: ignore[no-any-return]

    def add_up(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over ranks, in place, in their own type; every rank gets the same bits.

        Args:
            what: they are.
            tensors: on any device, the same shapes on all ranks.

        Raises:
            RanksApartError: another rank has gone.
        """
        if self.size == 1:
            return
        with self.together(what):
            flat = [x.detach().contiguous().view(-1) for x in tensors]
        for bucket in _buckets([piece for x in flat for piece in x.split(BUCKET)]):
            with self.together(what):  # here memory may not suffice
                total = torch.cat(bucket)
            group = self.group if total.device.type == "cpu" else None
            with self._collective(what, total.nbytes):
                torch.distributed.all_reduce(total, group=group)
            for piece, part in zip(bucket, total.split([x.numel() for x in bucket]), strict=True):
                piece.copy_(part)
        for x, whole in zip(tensors, flat, strict=True):
            if x.data_ptr() != whole.data_ptr():
                x.detach().copy_(whole.view(x.shape))

    @contextmanager
    def _collective(self, what: str, sent: int) -> Iterator[None]:
        """Count what is sent, and say what it means when the other side is gone."""
        self.sent += sent
        try:
            yield
        except RuntimeError as error:
            reason = first_line(error)
            if "timed out" in reason.lower():
                raise RanksApartError(
                    f"expected {self.size} ranks to exchange {what!r}, found that another one does not come "
                    f"({reason:.200})"
                ) from error
            raise RanksApartError(
                f"expected {self.size} ranks, found that another one has gone while they exchanged {what!r} "
                f"({reason:.200}); its own message says why"
            ) from error


_asked = 0
"""How often this process has asked for the ranks of its job."""


def _wait_for_all(rank: int, size: int, seconds: float) -> None:
    """Wait until all processes ask for the ranks of the job; making a group would wait for ever.

    Raises:
        RanksApartError: some do not.
    """
    global _asked
    keys = [f"entropy_probe/asked/{_asked}/{k}" for k in range(size)]
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(keys[rank], "here")
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError as error:
        there = [k for k, key in enumerate(keys) if store.check([key])]
        store.delete_key(keys[rank])
        raise RanksApartError(
            f"expected all {size} processes of the job to take part, found the ranks {there} only after {seconds:g} "
            "seconds; call it on every rank"
        ) from error
    _asked += 1


ALONE = Ranks()
"""One process, which takes everything and meets nobody."""


def _was_shared(error: Exception) -> bool:
    """Whether the other ranks know of an error, or cannot be told."""
    return isinstance(error, RanksApartError) or bool(getattr(error, "shared_by_ranks", False))


def _sendable(error: Exception) -> Exception:
    """An error that can be pickled and made again on the other side."""
    try:
        again = pickle.loads(pickle.dumps(error))  # of this process's own making
    except Exception:
        again = None
    if type(again) is type(error) and str(again) == str(error):
        return error
    return OtherRankError(f"{type(error).__name__}: {error}")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device, up to `BUCKET` numbers at a time."""
    bucket: list[Tensor] = []
    for x in tensors:
        alike = not bucket or (x.dtype, x.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or sum(y.numel() for y in bucket) + x.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(x)
    if bucket:
        yield bucket
