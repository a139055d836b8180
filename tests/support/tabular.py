"""Tabular policies of known tails, enumerated: what intervals are judged on.

A policy is a table of logits, one row per prefix, so that tails are made to order:

    light       every state has about the same entropy
    branch      a first token of probability `rare` leads to long responses of about eight times the entropy
    low         0.16 nats per token, most of it in few states
"""

from __future__ import annotations

import functools
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
        logits: of each prefix of the enumeration, `(prefixes, VOCABULARY)`.
        step: the update of them.
        probability: of each response, `(n,)`.
        new_probability: after the update.
        change: exact `[deltaH_seq, deltaH_tok]`, nats.
        slope: exact `[<grad H_seq, step>, <grad H_tok, step>]`, nats.
    """

    logits: Tensor
    step: Tensor
    probability: Tensor
    new_probability: Tensor
    change: Tensor
    slope: Tensor

    @property
    def exact(self) -> dict[str, list[float]]:
        """What each estimate of `Drawn` estimates, `[sequence, token]`."""
        return exact_values(self.slope, self.change)


@dataclass(frozen=True)
class Enumeration:
    """Every response of the capped process, as places in a table of logits with one row per prefix.

    Attributes:
        prefixes: that a token can follow, by their rows.
        state: the row that each token is drawn from, `(n, T)`.
        token: `(n, T)`.
        mask: whether there is a token, `(n, T)`.
    """

    prefixes: dict[tuple[int, ...], int]
    state: Tensor
    token: Tensor
    mask: Tensor

    def scored(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of tokens and entropies of their distributions, `(n, T)`, nats; 0 outside the mask."""
        logp = logits.log_softmax(-1)
        l = torch.where(self.mask, logp[self.state, self.token], 0.0)
        return l, torch.where(self.mask, -(logp.exp() * logp).sum(-1)[self.state], 0.0)

    def probability(self, logits: Tensor) -> Tensor:
        """Of each response, `(n,)`."""
        return self.scored(logits)[0].sum(1).exp()

    def entropy(self, logits: Tensor) -> Tensor:
        """`[H_seq, H_tok]`, nats."""
        l, h = self.scored(logits)
        p = l.sum(1).exp()
        N = (p * h.sum(1)).sum()
        return torch.stack([N, N / (p * self.mask.sum(1)).sum()])

    def change(self, logits: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`H` before the step, its change and its change to first order, each `[sequence, token]`, nats."""
        before, slope = torch.func.jvp(self.entropy, (logits,), (step,))
        return before, self.entropy(logits + step) - before, slope


@functools.lru_cache
def enumeration() -> Enumeration:
    """That of all the policies here."""
    responses = _responses()
    prefixes = {
        prefix: i for i, prefix in enumerate(sorted({r[:t] for r in responses for t in range(len(r))}))
    }
    state = torch.zeros(len(responses), CAP, dtype=torch.int64)
    token, mask = torch.zeros_like(state), torch.zeros(len(responses), CAP, dtype=torch.bool)
    for i, r in enumerate(responses):
        for t, y in enumerate(r):
            state[i, t], token[i, t], mask[i, t] = prefixes[r[:t]], y, True
    return Enumeration(prefixes, state, token, mask)


def tabular(kind: Kind, rare: float = 0.02, size: float = 0.05, seed: int = 0) -> Tabular:
    """Make one.

    Args:
        kind: see the module.
        rare: probability of the heavy branch.
        size: standard deviation of the update of a logit.
        seed: of logits and update.
    """
    g = torch.Generator().manual_seed(seed)
    every = enumeration()
    logits = torch.stack([_logits(kind, prefix, rare, g) for prefix in every.prefixes])
    step = size * torch.randn(logits.shape, generator=g, dtype=torch.float64)
    psi = torch.randn(VOCABULARY, FEATURES, generator=g, dtype=torch.float64)
    features = torch.randn(len(every.prefixes), FEATURES, generator=g, dtype=torch.float64)
    within = every.mask.unsqueeze(-1)

    def scored(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        expected = (values.softmax(-1) @ psi)[every.state]
        return *every.scored(values), torch.where(within, expected, 0.0)

    (l, h, _), (dl, dh, dpsi) = torch.func.jvp(scored, (logits,), (step,))
    l_new, h_new = every.scored(logits + step)
    _, change, slope = every.change(logits, step)
    return Tabular(
        logits=logits,
        step=step,
        probability=every.probability(logits),
        new_probability=every.probability(logits + step),
        old=TokenScores(l, h, every.mask, None, torch.where(within, features[every.state], 0.0)),
        new=TokenScores(l_new, h_new, every.mask),
        first=TokenTangents(dl, dh, dpsi),
        sampled_features=psi[every.token],
        change=change,
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
