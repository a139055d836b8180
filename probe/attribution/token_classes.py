"""Classes of the tokens of U: what contributions are added up by."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.estimators.loss_terms import high_entropy

TOP_ENTROPY = 0.2
"""Share of the tokens that count as those of high entropy (arXiv:2506.01939)."""
DECILES = 10
KINDS = ("eos", "digits", "words", "spaces", "punctuation")
"""By what a token's text is made of, see `kind_of_text`; the end of a response is the first of them."""
SIGNS = ("positive advantage", "negative advantage", "no advantage")
OUTCOMES = ("right", "wrong", "no reward")


def kind_of_text(text: str) -> str:
    """`digits`, `words` (with a letter), `spaces` or `punctuation` (all else), by the first of these that fits.

    >>> [kind_of_text(text) for text in (" 42", "x1", "  ", "+=", "")]
    ['digits', 'words', 'spaces', 'punctuation', 'punctuation']
    """
    bare = text.strip()
    if bare and all(unicodedata.category(c) == "Nd" for c in bare):
        return "digits"
    if any(c.isalpha() for c in bare):
        return "words"
    return "spaces" if text and not bare else "punctuation"


def token_labels(
    U: RolloutBatch, entropy: Tensor, token_text: Callable[[int], str] | None
) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """The ways to sort the tokens of U: a label of each, `(B, T)` int64, and the labels' names; -1 for none.

    - `advantage`: the sign of the response's advantage;
    - `outcome`: `right` where the reward of the response is above the middle of the smallest and largest of U, `wrong`
      where it is not; only where U has rewards that differ;
    - `entropy`: the fifth of the tokens of highest entropy, and the others;
    - `kind`: what the token's text is made of; `eos` is the end that the policy chose;
    - `position`: tenths of the response, from its first token to its last.

    Args:
        U: the update batch.
        entropy: `h`, `(B, T)`.
        token_text: the text of a token id; without it tokens are not sorted by their kind.
    """
    B, T = U.mask.shape
    found: dict[str, tuple[Tensor, tuple[str, ...]]] = {}

    def of_responses(label: Tensor) -> Tensor:
        return torch.where(U.mask, label.unsqueeze(1), -1)

    if U.advantages is not None:
        A = U.advantages
        found["advantage"] = of_responses(torch.where(A > 0, 0, torch.where(A < 0, 1, 2))), SIGNS
    outcome = outcomes(U)
    if outcome is not None:
        found["outcome"] = of_responses(outcome), OUTCOMES
    top = high_entropy(TOP_ENTROPY, entropy, U.mask)
    found["entropy"] = torch.where(U.mask, (~top).long(), -1), ("highest fifth", "others")
    place = torch.arange(T) * DECILES // U.lengths.clamp_min(1).unsqueeze(1)
    names = tuple(f"tenth {k + 1}" for k in range(DECILES))
    found["position"] = torch.where(U.mask, place.clamp_max(DECILES - 1), -1), names
    if token_text is None:
        return found
    kinds = {int(i): KINDS.index(kind_of_text(token_text(int(i)))) for i in U.completion_ids[U.mask].unique()}
    kind = torch.full((B, T), -1, dtype=torch.int64)
    kind[U.mask] = torch.tensor([kinds[int(i)] for i in U.completion_ids[U.mask]], dtype=torch.int64)
    last = (U.lengths - 1).clamp_min(0)
    ended = (U.lengths > 0) & ~U.truncated
    rows = torch.arange(B)[ended]
    kind[rows, last[ended]] = 0
    found["kind"] = kind, KINDS
    return found


def outcomes(U: RolloutBatch) -> Tensor | None:
    """0 for right responses, 1 for wrong ones, 2 without a reward, `(B,)`; None without rewards that differ."""
    if U.rewards is None:
        return None
    there = ~U.rewards.isnan()
    values = U.rewards[there]
    if not len(values) or float(values.min()) == float(values.max()):
        return None
    middle = (values.min() + values.max()) / 2
    label = torch.where(U.rewards > middle, 0, 1)
    return torch.where(there, label, 2)


def class_masks(labels: Mapping[str, tuple[Tensor, tuple[str, ...]]]) -> dict[str, Tensor]:
    """Every label of every way to sort as a mask, `(B, T)` bool, by its name; of those that some token has."""
    return {
        name: (label == k)
        for label, names in labels.values()
        for k, name in enumerate(names)
        if bool((label == k).any())
    }
