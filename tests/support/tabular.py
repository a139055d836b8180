"""Tabular policies of known tails, enumerated: what intervals are judged on.

A policy is a table of logits, one row per prefix, so that tails are made to order:

    light       every state has about the same entropy
    branch      a first token of probability `rare` leads to long responses of about eight times the entropy
    low         0.16 nats per token, most of it in few states
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from probe.scoring import TokenScores
from probe.scoring.scores import TokenTangents
from tests.support.experiment import Drawn, Scored, exact_values, judged

Kind = Literal["light", "branch", "low"]
VOCABULARY, CAP, EOS, FEATURES = 6, 5, 0, 8
"""Tokens, of which the first ends a response; longest response; features of states and of tokens."""
HEAVY = 1
"""The first token of the rare branch."""
DECIDED = {"branch": 5.5, "low": 7.0}
"""How far the likeliest token's logit stands out where the policy is decided."""


@dataclass(frozen=True)
class Tabular(Scored):
    """A policy, an update of it and everything the probe makes of each response.

    Attributes:
        probability: of each response, `(n,)`.
        new_probability: after the update.
        change: exact `[deltaH_seq, deltaH_tok]`, nats.
        slope: exact `[<grad H_seq, step>, <grad H_tok, step>]`, nats.
    """

    probability: Tensor
    new_probability: Tensor
    change: Tensor
    slope: Tensor

    @property
    def exact(self) -> dict[str, list[float]]:
        """What each estimate of `Drawn` estimates, `[sequence, token]`."""
        return exact_values(self.slope, self.change)


def tabular(kind: Kind, rare: float = 0.02, size: float = 0.05, seed: int = 0) -> Tabular:
    """Make one.

    Args:
        kind: see the module.
        rare: probability of the heavy branch.
        size: standard deviation of the update of a logit.
        seed: of logits and update.
    """
    g = torch.Generator().manual_seed(seed)
    responses = _responses()
    prefixes = {
        prefix: i for i, prefix in enumerate(sorted({r[:t] for r in responses for t in range(len(r))}))
    }
    logits = torch.stack([_logits(kind, prefix, rare, g) for prefix in prefixes])
    step = size * torch.randn(logits.shape, generator=g, dtype=torch.float64)
    state = torch.zeros(len(responses), CAP, dtype=torch.int64)
    token, mask = torch.zeros_like(state), torch.zeros(len(responses), CAP, dtype=torch.bool)
    for i, r in enumerate(responses):
        for t, y in enumerate(r):
            state[i, t], token[i, t], mask[i, t] = prefixes[r[:t]], y, True
    psi = torch.randn(VOCABULARY, FEATURES, generator=g, dtype=torch.float64)
    features = torch.randn(len(prefixes), FEATURES, generator=g, dtype=torch.float64)

    def scored(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logp = values.log_softmax(-1)
        l = torch.where(mask, logp[state, token], 0.0)
        h = torch.where(mask, -(logp.exp() * logp).sum(-1)[state], 0.0)
        return l, h, torch.where(mask.unsqueeze(-1), (logp.exp() @ psi)[state], 0.0)

    def exact(values: Tensor) -> Tensor:
        l, h, _ = scored(values)
        p = l.sum(1).exp()
        N = (p * h.sum(1)).sum()
        return torch.stack([N, N / (p * mask.sum(1)).sum()])

    (l, h, _), (dl, dh, dpsi) = torch.func.jvp(scored, (logits,), (step,))
    before, slope = torch.func.jvp(exact, (logits,), (step,))
    l_new, h_new, _ = scored(logits + step)
    return Tabular(
        probability=l.sum(1).exp(),
        new_probability=l_new.sum(1).exp(),
        old=TokenScores(l, h, mask, None, torch.where(mask.unsqueeze(-1), features[state], 0.0)),
        new=TokenScores(l_new, h_new, mask),
        first=TokenTangents(dl, dh, dpsi),
        sampled_features=psi[token],
        change=exact(logits + step) - before,
        slope=slope,
    )


def _responses() -> list[tuple[int, ...]]:
    """Every response: tokens that do not end it, and the end; cut off at the cap."""
    words = range(1, VOCABULARY)
    ended = [(*r, EOS) for t in range(CAP) for r in itertools.product(words, repeat=t)]
    return [*ended, *itertools.product(words, repeat=CAP)]


def _logits(kind: Kind, prefix: tuple[int, ...], rare: float, g: torch.Generator) -> Tensor:
    """Logits of the token after a prefix."""
    noise = torch.randn(VOCABULARY, generator=g, dtype=torch.float64)
    if kind == "light":
        return noise
    if kind == "branch" and prefix[:1] == (HEAVY,):  # long and undecided
        noise = 0.3 * noise
        noise[EOS] = -4.0
        return noise
    # decided, and soon over
    noise = noise + DECIDED[kind] * torch.nn.functional.one_hot(
        torch.tensor(EOS if prefix else 2 + int(torch.randint(VOCABULARY - 2, (1,), generator=g))), VOCABULARY
    )
    if kind == "branch" and not prefix:
        noise[HEAVY] = -math.inf
        rest = noise.exp().sum()
        noise[HEAVY] = torch.log(rest * rare / (1 - rare))
    return noise


FAMILIES: dict[str, tuple[Kind, float]] = {
    "light": ("light", 0.0),
    "low": ("low", 0.0),
    **{f"branch 1/{n}": ("branch", 1 / n) for n in (50, 200, 500, 2000)},
}
"""What `tabular` is given, by the name that tables show."""


def draw(space: Tabular, size: int, g: torch.Generator, controls: bool) -> Drawn:
    """Draw an E of some prompts, estimate everything, and judge.

    Args:
        space: the policy and its update.
        size: prompts.
        g: of the draw.
        controls: whether there are control variates, which the reported estimates then have.
    """
    rows = torch.multinomial(space.probability, size, replacement=True, generator=g)
    return judged(space.taken(rows), controls)
