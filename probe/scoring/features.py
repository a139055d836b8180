"""Features of states and tokens, out of which control variates are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.shards import whole

DIRECTIONS = 8
"""Principal directions of the output embedding that tokens and states are projected on."""
LARGEST_FEATURE = 4.0
"""Token features are clamped to this many standard deviations: tokens rare in the basis's batch can lie far out."""


@dataclass(frozen=True)
class FeatureBasis:
    """Fixed functions of a token `v` and of a state, chosen without looking at the batch they are used on.

    Attributes:
        tokens: `psi(v)`, `(V, K)`: a column of ones, whether `v` ends responses, and the projections of its output
            embedding on the principal directions of the tokens in use.
        directions: `(D_model, K_state)`; a state's features are its last hidden state's projections on them.
    """

    tokens: Tensor
    directions: Tensor

    def sampled(self, batch: RolloutBatch) -> Tensor:
        """`psi(y[i,t])` of the sampled tokens, `(B, T, K)`; entries outside the batch's mask mean nothing."""
        return self.tokens[batch.completion_ids.clamp(0, len(self.tokens) - 1)]

    def of(self, logp: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`(E_pi[psi], state features)`, `(n, K)` and `(n, K_state)`, from log-probs `(n, V)` and states `(n, D)`."""
        tokens = self.tokens.to(logp)
        return logp.exp() @ tokens, hidden.to(logp) @ self.directions.to(logp)


def feature_basis(model: nn.Module, batch: RolloutBatch) -> FeatureBasis | None:
    """A basis from the output embedding and the frequencies of the tokens in `batch`.

    Control variates stay unbiased for whatever basis that does not depend on the batch they are used on: give U here
    and use it on E.

    Args:
        model: a transformers causal LM.
        batch: responses that say which tokens are in use.

    Returns:
        The basis; None where the output layer has no dense weight `(V, D_model)` (a quantised one).
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    weight = None if weight is None else whole(weight)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    used, counts = batch.completion_ids[batch.mask].unique(return_counts=True)
    share = (counts / counts.sum()).double()
    rows = weight.detach()[used.to(weight.device)].to("cpu", torch.float64)
    mean = share @ rows
    _, scale, basis = torch.linalg.svd(share.sqrt().unsqueeze(1) * (rows - mean), full_matrices=False)
    kept = int((scale[:DIRECTIONS] > 1e-6 * scale[0].clamp_min(1e-30)).sum())
    directions = basis[:kept].T / scale[:kept]
    projections = (weight.detach().to("cpu", torch.float32) - mean.float()) @ directions.float()
    ends = torch.zeros(len(weight))
    lengths = batch.lengths
    finished = torch.nonzero((lengths > 0) & ~batch.truncated).flatten()
    ends[batch.completion_ids[finished, lengths[finished] - 1].unique()] = 1.0
    ones = torch.ones(len(weight), 1)
    tokens = torch.cat([ones, ends.unsqueeze(1), projections.clamp(-LARGEST_FEATURE, LARGEST_FEATURE)], dim=1)
    return FeatureBasis(tokens=tokens, directions=directions.float())
