"""Which prompts go into E and which into U."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from probe.errors.exceptions import DataError
from probe.errors.remedies import Remedy

_U_STREAM = 0
_E_STREAM = 1


def draw_prompts(
    num_prompts: int, B_E: int, B_U: int, disjoint: bool, seed: int
) -> tuple[list[int], list[int]]:
    """Draw the prompts of E and U by their index in the data set.

    U is `B_U` different prompts: the head of a random order of all of them. E is `B_E` independent uniform
    draws with replacement, from all prompts or, with `disjoint`, from those that are not in U.

    Each batch has a random stream of its own, made from `seed`, and the global generators are left alone. So
    U does not depend on `B_E`, and a larger batch begins with the smaller one of the same seed. With
    `disjoint`, a larger U takes out of E only the draws that fall on its new prompts. Studies of the batch
    size are paired.

    Args:
        num_prompts: number of prompts there are, numbered from 0.
        B_E: sequences of E, at least 0.
        B_U: prompts of U, at least 0.
        disjoint: keep the prompts of U out of E.
        seed: not negative.

    Returns:
        The indices of E (`B_E`, repetitions possible) and those of U (`B_U`, all different).

    Raises:
        DataError: a size or the seed is negative, or there are too few prompts for U, or none is left for E.

    >>> E, U = draw_prompts(num_prompts=10, B_E=4, B_U=3, disjoint=True, seed=0)
    >>> len(E), len(U), set(E) & set(U)
    (4, 3, set())
    """
    _check_sizes(num_prompts, B_E, B_U, disjoint, seed)
    U = torch.randperm(num_prompts, generator=_generator(seed, _U_STREAM))[:B_U]
    allowed = torch.ones(num_prompts, dtype=torch.bool)
    if disjoint:
        allowed[U] = False
    return _draw_allowed(allowed, B_E, _generator(seed, _E_STREAM)).tolist(), U.tolist()


def stream_seed(seed: int, name: str) -> int:
    """A seed for the random stream `name`, 63 bits."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check_sizes(num_prompts: int, B_E: int, B_U: int, disjoint: bool, seed: int) -> None:
    """Refuse sizes that cannot be served, with the numbers."""
    for name, value in (("num_prompts", num_prompts), ("B_E", B_E), ("B_U", B_U), ("seed", seed)):
        if value < 0:
            raise DataError(f"{name}: expected an integer of at least 0, found {value}")
    if num_prompts < B_U:
        raise DataError(
            f"batch_config.B_U: expected at most the {num_prompts} prompts of the data set (the prompts of U "
            f"are all different), found {B_U}; lower B_U or take a larger split"
        )
    if B_E > 0 and num_prompts == 0:
        raise DataError(Remedy.B_E, f": expected at least 1 prompt to draw from, found 0 for B_E = {B_E}")
    if disjoint and B_E > 0 and num_prompts == B_U:
        raise DataError(
            f"batch_config.disjoint: expected at least {B_U + 1} prompts (B_U = {B_U}, and 1 for E), found "
            f"{num_prompts}; lower B_U, take a larger split, or set disjoint: false"
        )


def _generator(seed: int, stream: int) -> torch.Generator:
    """A generator for one of several independent streams of a seed."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _draw_allowed(allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` allowed positions with replacement, by rejection, so that more draws only append."""
    kept: list[Tensor] = []
    missing = count
    while missing > 0:
        candidates = torch.randint(len(allowed), (256,), generator=generator)
        accepted = candidates[allowed[candidates]][:missing]
        kept.append(accepted)
        missing -= len(accepted)
    return torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64)
