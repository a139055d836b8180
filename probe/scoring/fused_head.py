"""Log-probs, entropies and their derivatives from hidden states, without a table of tokens by vocabulary.

For logits `z` of one token over the temperature, `m` the largest, `v*` where it is, `r = sum_(v != v*) exp(z_v - m)`,
`Z = 1 + r` and `p = exp(z - m) / Z`,

    l = z_y - m - log(1 + r)                  h = log(1 + r) - E_p[z - m]
    dl = dz_y - E_p[dz]                       dh = -Cov_p(z, dz)          d E_p[psi] = Cov_p(psi, dz)
    dl / dz = 1_y - p                         dh / dz = -p (z - m - log Z + h)

Neither `l` of the likeliest token nor `h`, a sum of terms of one sign, loses digits where a distribution is nearly
certain: the largest term is left out of the sum. The sums over the vocabulary are taken tile by tile while the
largest logit so far is kept (online softmax: Milakov and Gimelshein, arXiv:1805.02867), short pieces in the type of the
logits and all else in float64. Weights of an objective are constants, so that the gradient by the logits is known as
soon as a token's sums are: scoring costs one product with the output layer and a gradient two, as in fused
cross-entropies (Hsu et al., Liger Kernel, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge

from probe.scoring.features import FeatureBasis
from probe.scoring.head import OutputHead
from probe.scoring.logit_tail import LogitTail

TILE = 4096
"""Columns of the vocabulary whose logits are held at a time."""
TILE_ROWS = 1024
"""Tokens whose logits of one tile are held at a time."""
BLOCK = 32
"""Tokens whose exponentials of one tile are held at a time, more of a narrow one: what a processor's cache holds."""
PIECE = 512
"""Columns that are summed in the type of the logits; sums of these are in float64."""
FRESH = ("MmBackward0", "AddmmBackward0", "AddBackward0")
"""Operations whose backward does not need their result."""
NO_LOGIT = -1e300
"""Less than any logit; finite, so that it times 0 is 0."""
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
        rows: tokens whose logits over the whole vocabulary may be held. Where the output layer can be run in parts,
            `TILE` logits of as many tokens are, or of `TILE_ROWS` where these are more.
        basis: also give the features.

    Returns:
        `(l, h)`, both `(n,)` float64 in nats; with a basis `E_pi[psi]`, `(n, K)` float64, and the features of the
        states, `(n, K_state)`, as well. Dual numbers where logits are; of the states' features the values alone.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "expected grad mode to be off, found it on: gradients do not go through token_values"
        )
    few = max(rows, TILE_ROWS) if head.divides else rows
    parts = []
    for states, own in zip(hidden.split(few), labels.split(few), strict=True):
        sums = _Sums(own, head.tail, temperature, None if basis is None else basis.tokens)
        for start, end in head.spans(TILE):
            sums.add(start, head.outputs(states, start, end))
        values = sums.values()
        if basis is not None:
            primal = forward_ad.unpack_dual(states).primal
            values = (*values, primal.float() @ basis.directions.to(primal.device))
        parts.append(values)
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


class _Sums:
    """Sums over the vocabulary of some tokens, of the tiles seen so far; see the module's own text.

    With `z` relative to the largest logit so far and `e = exp(z)`, the columns of `others` are the sums of `e`, `e z`,
    `e dz` and `e z dz` over all tokens but the likeliest, those of `features` of `e psi` and `e dz psi` over all.
    """

    def __init__(self, labels: Tensor, tail: LogitTail, temperature: float, tokens: Tensor | None) -> None:
        """Nothing is seen.

        Args:
            labels: `(n,)`.
            tail: what is done to the output layer's logits.
            temperature: `tau`.
            tokens: `psi`, `(V, K)`, or None.
        """
        self._labels, self._tail, self._temperature, self._tokens = labels, tail, temperature, tokens
        self._largest = labels.new_full((len(labels), 1), NO_LOGIT, dtype=torch.float64)
        self._own, self._d_own, self._d_largest = torch.zeros_like(self._largest).expand(3, -1, -1).clone()
        self._others = self._largest.new_zeros(len(labels), 4)
        self._features = self._largest.new_zeros(2, len(labels), 0 if tokens is None else tokens.shape[1])
        self._moves = False

    def add(self, start: int, outputs: Tensor) -> None:
        """Take what the output layer gives for the tokens from `start` on, `(n, width)`.

        It is overwritten with the logits over the temperature.
        """
        z, dz = forward_ad.unpack_dual(outputs)
        self._moves = self._moves or dz is not None
        for column in range(0, z.shape[1], TILE):
            columns = slice(column, column + TILE)
            self._tile(start + column, z[:, columns], None if dz is None else dz[:, columns])

    def _tile(self, start: int, z: Tensor, dz: Tensor | None) -> None:
        """Take the logits of a tile; `z` is overwritten."""
        psi = None if self._tokens is None else self._tokens[start : start + z.shape[1]].to(z)
        found = _Found(torch.zeros_like(self._others), torch.zeros_like(self._features))
        largest, d_largest = torch.empty_like(self._largest), torch.zeros_like(self._largest)
        for rows in _blocks(z):
            place = found.rows(rows)
            largest[rows], slope = self._block(
                z[rows], None if dz is None else dz[rows], psi, self._largest[rows], place
            )
            if slope is not None:
                d_largest[rows] = slope
        self._pick(start, z, dz)
        moved = largest > self._largest
        self._join(self._largest - largest, moved, found)
        self._largest, self._d_largest = largest, torch.where(moved, d_largest, self._d_largest)

    def _block(
        self, z: Tensor, dz: Tensor | None, psi: Tensor | None, before: Tensor, found: _Found
    ) -> tuple[Tensor, Tensor | None]:
        """The sums of a few tokens over a tile, into `found`; the largest logits so far, and the tile's slopes."""
        self._tail.scaled(z, self._temperature)
        at = _likeliest(z)
        here = z.gather(1, at)
        moved, largest = here > before, torch.maximum(here.double(), before)
        w = None if dz is None else dz * self._tail.slope(z, self._temperature)
        slope = None if w is None else w.gather(1, at)
        z = z - largest.to(z)
        e = z.exp()
        if w is not None:
            w = e * w
        if psi is not None:
            found.features[0] = e @ psi
            if w is not None:
                found.features[1] = w @ psi
        for k, x in enumerate((e, w)):
            if x is not None:  # the largest so far is not among the others
                x.scatter_(1, at, x.gather(1, at).masked_fill_(moved, 0.0))
                found.others[:, 2 * k], found.others[:, 2 * k + 1] = _rowwise(x), _rowwise(x, z)
        return largest, slope

    def _join(self, shift: Tensor, moved: Tensor, found: _Found) -> None:
        """Bring the sums so far to the new largest logit, `-shift` above, and add those of a tile."""
        sums = self._others
        sums[:, :1] += moved  # what was the largest is one of the others now
        sums[:, 2:3] += moved * self._d_largest
        sums[:, 1::2] += shift * sums[:, 0::2]
        scale = shift.exp()
        self._others = scale * sums + found.others
        if self._tokens is not None:
            self._features = scale * self._features + found.features

    def _pick(self, start: int, z: Tensor, dz: Tensor | None) -> None:
        """The labels' own logits, where they are in this tile."""
        inside, index = _within(self._labels, start, z.shape[1])
        own = z.gather(1, index)
        self._own = torch.where(inside, own.double(), self._own)
        if dz is not None:
            d_own = dz.gather(1, index) * self._tail.slope(own, self._temperature)
            self._d_own = torch.where(inside, d_own.double(), self._d_own)

    @property
    def normalizer(self) -> tuple[Tensor, Tensor]:
        """The largest logits and `log Z` relative to them, both `(n, 1)` float64."""
        return self._largest, self._others[:, :1].log1p()

    def values(self) -> tuple[Tensor, ...]:
        """`(l, h)` and with features `E_p[psi]`, float64; dual numbers where logits were."""
        r, ez, e_dz, e_z_dz = self._others.unbind(1)
        Z = 1.0 + r
        mean, features = ez / Z, self._features[0] / Z.unsqueeze(1)
        found = [(self._own - self._largest).squeeze(1) - r.log1p(), r.log1p() - mean]
        found += [] if self._tokens is None else [features]
        if not self._moves:
            return tuple(found)
        d_largest = self._d_largest.squeeze(1)
        drift = (e_dz - r * d_largest) / Z  # E_p[dz] beyond the likeliest token's
        tangents = [
            (self._d_own.squeeze(1) - d_largest) - drift,
            mean * drift - (e_z_dz - d_largest * ez) / Z,
        ]
        if self._tokens is not None:
            tangents.append(self._features[1] / Z.unsqueeze(1) - features * (d_largest + drift).unsqueeze(1))
        return tuple(forward_ad.make_dual(x, dx) for x, dx in zip(found, tangents, strict=True))


def _blocks(tile: Tensor) -> Iterator[slice]:
    """The rows of a tile, as many at a time as `BLOCK` says; more where it is narrow."""
    few = BLOCK * (TILE // tile.shape[1])
    return (slice(row, row + few) for row in range(0, len(tile), few))


def _within(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which labels are among the columns from `start` on, and where; somewhere where they are not. Both `(n, 1)`."""
    here = (labels - start).unsqueeze(1)
    return (here >= 0) & (here < width), here.clamp(0, width - 1)


@dataclass(frozen=True)
class _Found:
    """The sums over one tile; see `_Sums`."""

    others: Tensor
    features: Tensor

    def rows(self, rows: slice) -> _Found:
        """Places for those of a few tokens."""
        return _Found(self.others[rows], self.features[:, rows])


def _likeliest(z: Tensor) -> Tensor:
    """Where each row's largest entry is, `(n, 1)`; in two steps, as maxima without their places are far faster."""
    if z.shape[1] <= PIECE:
        return z.argmax(1, keepdim=True)
    whole = z.shape[1] - z.shape[1] % PIECE
    pieces = z[:, :whole].unflatten(1, (-1, PIECE))
    top, piece = pieces.amax(-1).max(1, keepdim=True)
    at = piece * PIECE + pieces[torch.arange(len(z), device=z.device), piece.squeeze(1)].argmax(
        1, keepdim=True
    )
    if whole == z.shape[1]:
        return at
    last, place = z[:, whole:].max(1, keepdim=True)
    return torch.where(last > top, whole + place, at)


def _rowwise(x: Tensor, y: Tensor | None = None) -> Tensor:
    """`sum_v x[:, v] y[:, v]`, `(n,)` float64: short pieces in the type of `x`, which rounds them little."""
    products = x if y is None else x * y
    whole = products.shape[1] - products.shape[1] % PIECE
    found = products[:, :whole].unflatten(1, (-1, PIECE)).sum(-1).sum(1, dtype=torch.float64)
    return found if whole == products.shape[1] else found + products[:, whole:].sum(1)


def head_gradients(
    head: OutputHead,
    hidden: Tensor,
    labels: Tensor,
    temperature: float,
    weights: Callable[[Tensor, Tensor], Weights],
    own: Sequence[Tensor] = (),
) -> list[list[Tensor | None]]:
    """Gradients of `sum_t a_k[t] l[t] + b_k[t] h[t]` by hidden states and by parameters of the output layer.

    One product gives the logits of all objectives, one more by objective its gradient. The logits are held meanwhile;
    beside them a tile, or as many numbers again for each objective but the last where the layer is run as a whole,
    as it is for gradients of its own parameters.

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
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        head.converted()  # a backward needs all of them, so that converting tile by tile saves nothing
    sums = _Sums(labels, head.tail, temperature, None)
    tiles = []
    for start, end in [(0, None)] if own else head.spans(TILE):
        with torch.enable_grad():
            outputs = head.outputs(leaf, start, end)
        edge = get_gradient_edge(outputs)
        kept = edge.node.name() not in FRESH  # what may be needed for its own backward is not overwritten
        z = outputs.detach().clone() if kept else outputs.detach()
        sums.add(start, z)
        tiles.append((start, edge, z))
    l, h = sums.values()
    objectives = _Objectives(*weights(l, h), l, h, labels, *sums.normalizer)
    found: list[list[Tensor | None]] = [[None] * (1 + len(own)) for _ in range(objectives.count)]
    while tiles:
        start, edge, z = tiles.pop(0)
        gradients = objectives.by_logits(start, z, head.tail, temperature)
        for k in range(objectives.count):
            more = torch.autograd.grad(
                [edge],
                [leaf, *own],
                [gradients.pop(0)],
                retain_graph=k < objectives.count - 1,
                allow_unused=True,
            )
            found[k] = [
                y if x is None else x if y is None else x + y for x, y in zip(found[k], more, strict=True)
            ]
    return found


class _Objectives:
    """`sum_t a_k[t] l[t] + b_k[t] h[t]` of some tokens, whose sums are known.

    The slope of one by a logit other than the label's is `-p (a + b (log p + h))`.
    """

    def __init__(
        self, a: Tensor, b: Tensor, l: Tensor, h: Tensor, labels: Tensor, largest: Tensor, log_Z: Tensor
    ) -> None:
        """Constants of each token.

        Args:
            a: weights of `l`, `(K, n)`.
            b: weights of `h`, `(K, n)`.
            l: `(n,)` float64.
            h: `(n,)` float64.
            labels: `(n,)`.
            largest: the largest logits, `(n, 1)`.
            log_Z: relative to these, `(n, 1)`.
        """
        self.count, self._labels, self._largest = len(a), labels, largest
        a, b, p, over_Z = a.to(l), b.to(l), l.exp(), (-log_Z).exp()
        # 1 - p keeps its digits where p is nearly 1
        self._label_slope = -a * torch.expm1(l) - b * p * (l + h)
        self._factor = -b.unsqueeze(-1) * over_Z
        self._level = -(a.unsqueeze(-1) + b.unsqueeze(-1) * (h.unsqueeze(1) - log_Z)) * over_Z

    def by_logits(self, start: int, z: Tensor, tail: LogitTail, temperature: float) -> list[Tensor]:
        """The gradients by the output layer's logits.

        Args:
            start: token of the first column.
            z: logits over the temperature, `(n, width)`; overwritten with the last gradient.
            tail: made them of the output layer's.
            temperature: `tau`.
        """
        found = [*(torch.empty_like(z) for _ in range(self.count - 1)), z]
        largest, factor, level = (x.to(z) for x in (self._largest, self._factor, self._level))
        inside, index = _within(self._labels, start, z.shape[1])
        own_slope = tail.slope(z.gather(1, index), temperature)
        for column in range(0, z.shape[1], TILE):
            columns = slice(column, column + TILE)
            for rows in _blocks(z[:, columns]):
                part = z[rows, columns]
                slope = tail.slope(part, temperature)
                shifted = part - largest[rows]
                e = shifted.exp()
                if isinstance(slope, Tensor) or slope != 1.0:
                    e.mul_(slope)
                for k, gradient in enumerate(found):
                    target = gradient[rows, columns]
                    torch.mul(shifted, factor[k, rows], out=target).add_(level[k, rows]).mul_(e)
        for label_slope, gradient in zip(self._label_slope, found, strict=True):
            mine = torch.where(inside, label_slope.unsqueeze(1).to(z) * own_slope, gradient.gather(1, index))
            gradient.scatter_(1, index, mine)
        return found
