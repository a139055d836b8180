"""The processes that share a run: who takes which part, and the meetings in which they exchange what they found.

All processes ("ranks") hold the whole batch and do all arithmetic on gathered numbers alike; only passes over the model
are shared out. Every meeting begins with a word of each rank on whether it is well. So an error on one rank becomes the
same error on all, at the same place, and what follows from it (another way to differentiate where memory does not
suffice) is done by all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from probe.errors.exceptions import RanksApartError

T = TypeVar("T")
BUCKET = 2**24
"""Numbers that are summed over ranks at a time."""
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
    def of_job(cls, seconds: float = 600.0) -> Ranks:
        """All processes of the job, with a group of their own for tensors on the CPU; alone where there is one.

        Args:
            seconds: that they wait for each other.

        Raises:
            RanksApartError: not all of them ask for it.
        """
        rank, size = rank_and_size()
        if size == 1:
            return cls()
        _wait_for_all(rank, size, seconds)
        return cls(rank, size, torch.distributed.new_group(backend="gloo"))

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
            Exception: what the block raised on this rank or, where it raised on others only, on the first of these.
            RanksApartError: another rank is at another place, or has gone.
        """
        found: list[list[int]] = []
        try:
            yield found
        except Exception as error:
            if not _was_shared(error):
                self._meet(what, words, found, error)
            raise
        self._meet(what, words, found, None)

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
            errors = self._gathered(what, None if error is None else _sendable(error))
            if error is None:
                raise _marked(errors[failed[0]], failed[0])
            error.__dict__["shared_by_ranks"] = True
            return
        places = {int(head[0]) for head in heads}
        if len(places) > 1:
            raise RanksApartError(
                f"expected all {self.size} ranks at one place, found rank {self.rank} at the end of {what!r} and "
                "others elsewhere; ranks must run the same version on the same files, on processors of one kind"
            )

    def gathered(self, what: str, value: T) -> list[T]:
        """What each rank has, in the order of the ranks; small Python objects and tensors on the CPU.

        Raises:
            RanksApartError: another rank has gone.
        """
        return [value] if self.size == 1 else self._gathered(what, value)

    def _gathered(self, what: str, value: Any) -> list[Any]:
        """See `gathered`."""
        values: list[Any] = [None] * self.size
        with self._collective(what, _bytes_of(value)):
            torch.distributed.all_gather_object(values, value, group=self.group)
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
        made: list[Any] = [None]
        with self.together(what):
            if self.first:
                made[0] = make()
        if self.size > 1:
            with self._collective(what, _bytes_of(made[0]) if self.first else 0):
                torch.distributed.broadcast_object_list(made, src=0, group=self.group)
        return made[0]  # type: ignore[no-any-return]

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
        for bucket in _buckets(tensors):
            flat = torch.cat([x.detach().reshape(-1) for x in bucket])
            group = self.group if flat.device.type == "cpu" else None
            with self._collective(what, flat.nbytes):
                torch.distributed.all_reduce(flat, group=group)
            for x, total in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.detach().copy_(total.view_as(x))

    @contextmanager
    def _collective(self, what: str, sent: int) -> Iterator[None]:
        """Count what is sent, and say what it means when the other side is gone."""
        self.sent += sent
        try:
            yield
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
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
    _asked += 1
    keys = [f"entropy_probe/asked/{_asked}/{k}" for k in range(size)]
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(keys[rank], "here")
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError as error:
        there = [k for k, key in enumerate(keys) if store.check([key])]
        raise RanksApartError(
            f"expected all {size} processes of the job to take part, found the ranks {there} only after {seconds:g} "
            "seconds; call it on every rank"
        ) from error


ALONE = Ranks()
"""One process, which takes everything and meets nobody."""


def _was_shared(error: Exception) -> bool:
    """Whether the other ranks know of an error, or cannot be told."""
    return isinstance(error, RanksApartError) or bool(getattr(error, "shared_by_ranks", False))


def _sendable(error: Exception) -> Exception:
    """An error that can be pickled and made again on the other side."""
    import pickle

    try:
        again = pickle.loads(pickle.dumps(error))  # of this process's own making
    except Exception:
        again = None
    if type(again) is type(error) and str(again) == str(error):
        return error
    return OtherRankError(f"{type(error).__name__}: {error}")


def _marked(error: Exception, rank: int) -> Exception:
    """An error of another rank, which all know of."""
    error.__dict__.update(shared_by_ranks=True, of_rank=rank)
    return error


def _bytes_of(value: Any) -> int:
    """About how many bytes an object is sent as."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes_of, value))
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    return len(str(value)) if isinstance(value, (str, bytes)) else 8


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
