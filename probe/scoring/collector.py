"""Values per token, collected from microbatches into the order of the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.distributed.ranks import ALONE, Ranks
from probe.errors.exceptions import NumericalError, RanksApartError, RolloutError
from probe.errors.remedies import Remedy
from probe.scoring.scores import TokenScores

Progress = Callable[[int, int], None]
"""Called with the number of sequences done and the total."""


class Collector:
    """Gathers what a pass finds per token into arrays `(B, T, ...)`, those of other ranks too, and reports progress."""

    def __init__(self, batch: RolloutBatch, progress: Progress | None, ranks: Ranks = ALONE) -> None:
        """Start empty.

        Args:
            batch: that the pass goes over.
            progress: called as it advances.
            ranks: that share it.

        Raises:
            RolloutError: the batch has no response token.
        """
        if not bool(batch.mask.any()):
            raise RolloutError(
                f"expected at least one response token, found {len(batch)} empty responses; check the sampling "
                "settings or the rollout file"
            )
        self._mask = batch.mask
        self._arrays: list[Tensor] = []
        self._progress = progress
        self._ranks = ranks
        self._seen = batch.lengths == 0
        self._done = int(self._seen.sum())

    def add(self, sequence: Tensor, position: Tensor, *values: Tensor) -> list[Tensor]:
        """Store values `(n, ...)` of tokens; returns them detached, on the CPU, in float64."""
        found = [x.detach().to("cpu", torch.float64) for x in values]
        if not self._arrays:
            self._arrays = [
                torch.zeros(*self._mask.shape, *x.shape[1:], dtype=_storage(k)) for k, x in enumerate(found)
            ]
        for array, x in zip(self._arrays, found, strict=True):
            array[sequence, position] = x.to(array.dtype)
        self._seen[sequence] = True
        return found

    def advance(self, count: int) -> None:
        """Report `count` more sequences of this rank; the others are taken to be as far, and the end to be the end."""
        self._done += count
        B = len(self._mask)
        if self._progress is not None and count:
            self._progress(
                self._done if self._ranks.size == 1 else min(self._done * self._ranks.size, B - 1), B
            )

    def arrays(self) -> list[Tensor]:
        """What was gathered, by all ranks, checked.

        Raises:
            NumericalError: a value is not finite.
        """
        if self._ranks.size > 1:
            self._exchange()
        for name, values in zip(("log-prob", "entropy"), self._arrays, strict=False):
            bad = ~torch.isfinite(values)
            if bool(bad.any()):
                i, t = (int(x) for x in bad.nonzero()[0])
                raise NumericalError(
                    f"expected finite scores, found a {name} of {values[i, t]} at sequence {i}, token {t} "
                    f"({int(bad.sum())} in all); check the weights and ",
                    Remedy.WEIGHT_TYPE,
                )
        return self._arrays

    def _exchange(self) -> None:
        """Bring in what the other ranks have gathered."""
        rows = (self._seen & self._mask.any(dim=1)).nonzero().flatten()
        missing = self._mask.any(dim=1).int()
        missing[rows] -= 1
        own = rows, [array[rows][self._mask[rows]] for array in self._arrays]
        for rank, (rows, values) in enumerate(self._ranks.gathered("values per token", own)):
            if rank == self._ranks.rank or not values:
                continue
            if not self._arrays:
                self._arrays = [torch.zeros(*self._mask.shape, *x.shape[1:], dtype=x.dtype) for x in values]
            missing[rows] -= 1
            theirs = torch.zeros_like(self._mask)
            theirs[rows] = self._mask[rows]
            for array, x in zip(self._arrays, values, strict=True):
                array[theirs] = x
        if bool((missing != 0).any()):
            raise RanksApartError(
                f"expected every response to be scored by one of {self._ranks.size} ranks, found "
                f"{int((missing != 0).sum())} that none or several have: they have cut the batch in different ways"
            )
        if self._progress is not None:
            self._progress(len(self._mask), len(self._mask))

    def finish(self) -> TokenScores:
        """The scores."""
        logprob, entropy, *features = self.arrays()
        expected, states = features or (None, None)
        return TokenScores(logprob, entropy, self._mask, expected, states)


def _storage(k: int) -> torch.dtype:
    """What is differenced is kept in float64: log-probs, entropies, expected features. State features need less."""
    return torch.float64 if k < 3 else torch.float32


MakeProgress = Callable[[str], Progress]
"""Given the name of a pass, the function to call with its progress."""


def no_progress(what: str) -> Progress:
    """Nobody is told."""
    return lambda done, total: None
