"""torchmetrics of the entropy and its change: they stream over microbatches and reduce over ranks.

They can be used in any training or evaluation loop (`metric.update(...)` per microbatch, `metric.compute()` at the
end), on the token scores that `probe.scoring.score_tokens` or a loop of one's own gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from probe.errors.exceptions import NumericalError
from probe.estimators.entropy_change import Reweighting
from probe.estimators.ground_truth import GroundTruth, reweighted_change
from probe.scoring.scores import TokenScores


class PolicyEntropy(Metric):
    """Entropy of a policy from its own samples: `H_seq = mean N` and `H_tok = mean N / mean T`, nats.

    The state is three sums, so that memory does not grow with the batch.

    Example:
        >>> metric = PolicyEntropy()
        >>> metric.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'H': 3.0, 'H_tok': 2.0}
    """

    full_state_update = False
    entropy: Tensor
    tokens: Tensor
    sequences: Tensor

    def __init__(self, **kwargs: Any) -> None:
        """Start empty; `kwargs` as for any torchmetrics Metric."""
        super().__init__(**kwargs)
        for name in ("entropy", "tokens", "sequences"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, entropy: Tensor, mask: Tensor) -> None:
        """Add sequences.

        Args:
            entropy: `h`, `(b, T)` nats.
            mask: `(b, T)` bool, the response tokens.

        Raises:
            ValueError: the shapes differ.
        """
        if entropy.shape != mask.shape:
            raise ValueError(
                f"expected entropy and mask of one shape (b, T), found {tuple(entropy.shape)} and {tuple(mask.shape)}"
            )
        self.entropy += (entropy.double() * mask).sum()
        self.tokens += mask.sum()
        self.sequences += len(mask)

    def compute(self) -> dict[str, Tensor]:
        """`{"H": nats per response, "H_tok": nats per token}`.

        Raises:
            NumericalError: no token was seen.
        """
        if float(self.tokens) == 0:
            raise NumericalError("expected at least one response token, found none; call update first")
        return {"H": self.entropy / self.sequences, "H_tok": self.entropy / self.tokens}


class EntropyChange(Metric):
    """The entropy change measured on the same samples before and after an update; see `measure`.

    The state is what the estimators need per token, `(b, T)` float64 arrays, gathered over ranks: the weights are
    shifted by the maximum over all of them, and the result is that of one process. `group` numbers must be unique
    over ranks.
    """

    full_state_update = False
    rows: list[Tensor]
    group: list[Tensor]

    def __init__(
        self,
        reported: Reweighting = "per_decision",
        clip: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Start empty.

        Args:
            reported: see `measure`.
            clip: see `measure`.
            kwargs: as for any torchmetrics Metric.
        """
        super().__init__(**kwargs)
        self.reported: Reweighting = reported
        self.clip = clip
        for name in ("rows", "group"):
            self.add_state(name, [], dist_reduce_fx=None)

    def update(self, old: TokenScores, new: TokenScores, group: Tensor) -> None:
        """Add sequences.

        Args:
            old: scores under the policy that sampled, `b` sequences.
            new: scores of the same sequences under the updated policy.
            group: `(b,)` int64, equal for responses to the same draw of a prompt.

        Raises:
            ValueError: the batches differ in shape.
        """
        if old.logprob.shape != new.logprob.shape:
            raise ValueError(
                f"expected scores of the same batch, found {old.logprob.shape} and {new.logprob.shape}"
            )
        parts = (old.logprob, old.entropy, new.logprob, new.entropy, old.mask.double())
        # one tensor per rank, however many updates: ranks need not have seen equally many microbatches
        self.rows[:] = [_joined([*self.rows, torch.stack(parts).to(self.device)])]
        self.group[:] = [torch.cat([*self.group, group.to(self.device)])]

    def compute(self) -> dict[str, Tensor]:
        """`deltaH`, `deltaH_se` (nats per response), `deltaH_tok`, `deltaH_tok_se` (nats per token) and `ESS`."""
        found = self._measure()
        values = {
            "deltaH": found.change.sequence.value,
            "deltaH_se": found.change.sequence.se,
            "deltaH_tok": found.change.token.value,
            "deltaH_tok_se": found.change.token.se,
            "ESS": found.weights.ess,
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def ground_truth(self) -> GroundTruth:
        """Everything: all estimators, influences, weights and scores, of all ranks."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._measure()

    def _measure(self) -> GroundTruth:
        if not list(self.rows):
            raise NumericalError("expected at least one sequence, found none; call update first")
        l_old, h_old, l_new, h_new, mask = _joined(list(self.rows)).cpu()
        on = mask.bool()
        return reweighted_change(
            TokenScores(l_old, h_old, on),
            TokenScores(l_new, h_new, on),
            torch.cat(list(self.group)).cpu(),
            self.reported,
            self.clip,
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """Arrays `(5, b, T)` of different widths as one, padded with zeros."""
    widest = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, widest - part.shape[2])) for part in parts], dim=1)
