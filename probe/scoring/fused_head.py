"""Log-probs, entropies and their derivatives from hidden states, without a table of tokens by vocabulary.

For logits `z` of one token, `m` their maximum, `Z = sum_v exp(z_v - m)` and `p = exp(z - m) / Z`,

    l = z_y - m - log Z                       h = log Z - E_p[z - m]
    dl = dz_y - E_p[dz]                       dh = -Cov_p(z, dz)          d E_p[psi] = Cov_p(psi, dz)
    dl / dz = 1_y - p                         dh / dz = -p (z - m - log Z + h)

The sums over the vocabulary are taken tile by tile while the maximum so far is kept (online softmax: Milakov and
Gimelshein, arXiv:1805.02867), short pieces in the type of the logits and all else in float64. Weights of an objective
are constants, so that the gradient by the logits is known as soon as a token's sums are: scoring costs one product with
the output layer and a gradient two, as in fused cross-entropies (Hsu et al., Liger Kernel, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from probe.scoring.features import FeatureBasis
from probe.scoring.head import OutputHead

TILE = 8192
"""Columns of the vocabulary whose logits are held at a time."""
TILE_ROWS = 1024
"""Tokens whose logits of one tile are held at a time."""
PIECE = 512
"""Columns that are summed in the type of the logits; sums of these are in float64."""
Weights = tuple[Tensor, Tensor]
"""`(a, b)`: constant weights `(K, n)` of `l` and of `h` in `K` objectives."""


def token_values(
    head: OutputHead,
    hidden: Tensor,
    labels: Tensor,
    temperature: float,
    rows: int,
    basis: FeatureBasis | None = None,
) -> tuple[Tensor, ...]:
    """Log-probs and entropies of tokens, and what control variates need; with their tangents where there are any.

    It is for passes with grad mode off: gradients do not go through it. Tangents of dual numbers do, those of the
    hidden states and those of values that stand in for the output layer's parameters.

    Args:
        head: the output layer and what follows it.
        hidden: `(n, D_model)`.
        labels: `(n,)` token ids.
        temperature: the sampling temperature `tau`.
        rows: tokens whose logits over the whole vocabulary may be held; `TILE_ROWS` by `TILE` of them are where the
            output layer can be run in parts.
        basis: also give the features.

    Returns:
        `(l, h)`, both `(n,)` float64 in nats; with a basis `E_pi[psi]`, `(n, K)` float64, and the features of the
        states, `(n, K_state)`, as well. Dual numbers where logits are; of the states' features the values alone.
    """
    width = head.vocabulary if head.divides and head.vocabulary > TILE else None
    few = rows if width is None else max(rows, TILE_ROWS)
    parts = []
    for states, own in zip(hidden.split(few), labels.split(few), strict=True):
        sums = _Sums(own, temperature, None if basis is None else basis.tokens)
        if width is None:
            sums.add(0, head.logits(states))
        else:
            for start in range(0, width, TILE):
                sums.add(start, head.logits(states, start, min(start + TILE, width)))
        values = sums.finish()
        if basis is not None:
            primal = forward_ad.unpack_dual(states).primal
            values = (*values, primal.float() @ basis.directions.to(primal.device))
        parts.append(values)
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


class _Sums:
    """Sums over the vocabulary of some tokens, of the tiles seen so far; see the module's own text."""

    def __init__(self, labels: Tensor, temperature: float, tokens: Tensor | None) -> None:
        """Nothing is seen.

        Args:
            labels: `(n,)`.
            temperature: `tau`.
            tokens: `psi`, `(V, K)`, or None.
        """
        self._labels, self._temperature, self._tokens = labels, temperature, tokens
        self._largest: Tensor | None = None
        self._sums: list[Tensor] = []
        self._own: list[Tensor] = []
        self._moves = False

    def add(self, start: int, logits: Tensor) -> None:
        """Take the logits `(n, width)` of the tokens from `start` on, which are overwritten.

        The sums are those of `e`, `e z`, `e psi`, and of `e dz`, `e z dz`, `e psi dz`, with `e = exp(z)` and `z`
        relative to the largest logit so far.
        """
        if self._temperature != 1.0:
            logits = logits / self._temperature
        z, dz = forward_ad.unpack_dual(logits)
        here, end = self._labels - start, start + z.shape[1]
        largest = z.amax(1) if self._largest is None else torch.maximum(self._largest, z.amax(1))
        self._pick(here, z, dz)
        psi = None if self._tokens is None else self._tokens[start:end].to(z)
        z = z.sub_(largest.unsqueeze(1))
        e = z.exp()
        found = [_rowwise(e), _rowwise(e, z)]
        if psi is not None:
            found.append(e @ psi)
        self._moves = self._moves or dz is not None
        if dz is None:
            found += [torch.zeros_like(x) for x in found]
        else:
            w = e.mul_(dz)
            found += [_rowwise(w), _rowwise(w, z)]
            if psi is not None:
                found.append(w @ psi)
        found = [x.double() for x in found]
        if self._largest is not None:
            half, shift = len(found) // 2, (self._largest.double() - largest.double())
            before = list(self._sums)
            for first in (0, half):  # the sums with `z` in them move with the maximum
                before[first + 1] = before[first + 1] + shift * before[first]
            scale = shift.exp()
            found = [
                x + (scale if x.dim() == 1 else scale.unsqueeze(1)) * y
                for x, y in zip(found, before, strict=True)
            ]
        self._largest, self._sums = largest, found

    def _pick(self, here: Tensor, z: Tensor, dz: Tensor | None) -> None:
        """The labels' own logits, where they are in this tile."""
        index = here.clamp(0, z.shape[1] - 1).unsqueeze(1)
        found = [z.gather(1, index).squeeze(1).double()]
        found.append(torch.zeros_like(found[0]) if dz is None else dz.gather(1, index).squeeze(1).double())
        inside = (here >= 0) & (here < z.shape[1])
        before = self._own or [torch.zeros_like(found[0])] * 2
        self._own = [torch.where(inside, x, y) for x, y in zip(found, before, strict=True)]

    def finish(self) -> tuple[Tensor, ...]:
        """`(l, h)` and with features `E_p[psi]`, float64; dual numbers where logits were."""
        assert self._largest is not None
        half = len(self._sums) // 2
        Z, entropy_sum, *features = self._sums[:half]
        dZ, z_dz, *features_dz = (x / (Z if x.dim() == 1 else Z.unsqueeze(1)) for x in self._sums[half:])
        mean = entropy_sum / Z
        expected = [x / Z.unsqueeze(1) for x in features]
        values = [self._own[0] - self._largest.double() - Z.log(), Z.log() - mean, *expected]
        if not self._moves:
            return tuple(values)
        tangents = [self._own[1] - dZ, dZ * mean - z_dz]
        tangents += [x - y * dZ.unsqueeze(1) for x, y in zip(features_dz, expected, strict=True)]
        return tuple(forward_ad.make_dual(x, dx) for x, dx in zip(values, tangents, strict=True))


def _rowwise(x: Tensor, y: Tensor | None = None) -> Tensor:
    """`sum_v x[:, v] y[:, v]`, `(n,)` float64: short pieces in the type of `x`, which rounds them little."""
    products = x if y is None else x * y
    whole = products.shape[1] - products.shape[1] % PIECE
    pieces = products[:, :whole].unflatten(1, (-1, PIECE)).sum(-1)
    return pieces.double().sum(1) + products[:, whole:].sum(1)


def head_gradients(
    head: OutputHead,
    hidden: Tensor,
    labels: Tensor,
    temperature: float,
    weights: Callable[[Tensor, Tensor], Weights],
    own: Sequence[Tensor] = (),
) -> list[list[Tensor | None]]:
    """Gradients of `sum_t a_k[t] l[t] + b_k[t] h[t]` by hidden states and by parameters of the output layer.

    One product gives the logits of all objectives, one more by objective its gradient; in between, what is held of the
    size of the logits is they themselves, their exponentials and one gradient.

    Args:
        head: the output layer and what follows it.
        hidden: `(n, D_model)`, in float32 or better.
        labels: `(n,)` token ids.
        temperature: the sampling temperature `tau`.
        weights: given `(l, h)`, both `(n,)` float64 in nats, the constant weights.
        own: parameters of the output layer.

    Returns:
        For each objective the gradient by `hidden` and those by `own`; None by what it does not depend on.
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        output = head.outputs(leaf)
    tail, z = head.tail, output.detach()
    with torch.no_grad():
        z = tail(z) / temperature if tail.changes or temperature != 1.0 else z.clone()
        largest = z.amax(1, keepdim=True)
        e = torch.empty_like(z)
        Z, mean = (
            torch.zeros_like(z[:, 0], dtype=torch.float64),
            torch.zeros_like(z[:, 0], dtype=torch.float64),
        )
        own_logit = z.gather(1, labels.unsqueeze(1)).double().squeeze(1)
        tiles = [slice(start, start + TILE) for start in range(0, z.shape[1], TILE)]
        for tile in tiles:
            torch.exp(z[:, tile].sub_(largest), out=e[:, tile])
            Z += _rowwise(e[:, tile])
            mean += _rowwise(e[:, tile], z[:, tile])
        mean /= Z
        h = Z.log() - mean
        a, b = weights(own_logit - largest.squeeze(1).double() - Z.log(), h)
        found: list[list[Tensor | None]] = []
        for k in range(len(a)):
            # p (-a - b (z - m - log Z + h)), as e (slope (z - m) + level), and a more at the label
            slope = (-b[k] / Z).to(z).unsqueeze(1)
            level = ((-a[k] + b[k] * mean) / Z).to(z).unsqueeze(1)
            last = k == len(a) - 1
            gradient = z if last and tail.softcap is None else torch.empty_like(z)
            for tile in tiles:
                torch.mul(z[:, tile], slope, out=gradient[:, tile]).add_(level).mul_(e[:, tile])
            gradient.scatter_add_(1, labels.unsqueeze(1), a[k].to(z).unsqueeze(1))
            gradient = tail.gradient(gradient, z, largest, temperature)
            found.append(
                list(
                    torch.autograd.grad(
                        output, [leaf, *own], gradient, retain_graph=not last, allow_unused=True
                    )
                )
            )
    return found
