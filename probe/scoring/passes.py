"""The model passes: scoring a batch, and gradients of weighted sums of its token scores.

Everything the probe reports is a cheap reduction of what these passes give. They stream over microbatches, so that
memory does not grow with the size of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from probe.data.batch import RolloutBatch
from probe.errors import NumericalError, RolloutError
from probe.loading import trainable_parameters
from probe.scoring.features import FeatureBasis
from probe.scoring.head import OutputHead, token_log_probs, token_statistics
from probe.scoring.microbatch import MicroBatch, microbatches
from probe.scoring.room import check_batch
from probe.scoring.scores import TokenScores
from probe.snapshot import standing_in

Progress = Callable[[int, int], None]
"""Called with the number of sequences done and the total."""

TokenWeights = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`(sequence, position, l, h) -> (a, b)`: for `n` tokens, given their place in the batch and their detached scores
(all `(n,)`, CPU, float64), the constant weights `(K, n)` of `l` and of `h` in each of `K` objectives."""


@dataclass(frozen=True)
class Policy:
    """A causal LM as the probe sees it: `pi = softmax(logits / temperature)`.

    Attributes:
        model: a transformers causal LM, possibly wrapped by peft, in evaluation mode.
        temperature: `tau`.
        microbatch_size: sequences per pass.
        head_chunk_tokens: tokens whose logits are held at a time.
        autocast: a context manager factory for mixed precision (Fabric's `autocast`).
        values: values that stand in for some of the model's parameters, by name; the parameters themselves are not
            touched (`probe.snapshot.standing_in`). Dual numbers are allowed, which makes a pass forward-mode.
    """

    model: nn.Module
    temperature: float = 1.0
    microbatch_size: int = 2
    head_chunk_tokens: int = 256
    autocast: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    values: Mapping[str, Tensor] | None = None

    def at(self, values: Mapping[str, Tensor]) -> Policy:
        """The policy with other values in the place of its parameters, which stay as they are.

        Args:
            values: by parameter name; each is brought to the parameter's device and type.

        Raises:
            ValueError: a name is not one of a parameter.
        """
        named = dict(self.model.named_parameters())
        unknown = sorted(set(values) - set(named))
        if unknown:
            raise ValueError(f"expected values for parameters of the model, found {unknown[:10]}")
        own = {name: v.to(named[name]) for name, v in values.items()}
        return replace(self, values={**(self.values or {}), **own})

    def moved(self, direction: Mapping[str, Tensor], scale: float) -> Policy:
        """The policy at `theta + scale * direction`, `theta` being the values it has now.

        Args:
            direction: by parameter name.
            scale: in units of the direction.
        """
        here = self.point(direction)
        return self.at({n: here[n] + scale * v.to(here[n]) for n, v in direction.items()})

    def point(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The values of some parameters, those that stand in for them included; detached, not copied."""
        named = {n: p.detach() for n, p in self.model.named_parameters()} | dict(self.values or {})
        return {name: named[name] for name in names}

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embedding."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[operator]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, in the model's order; `D` numbers in all."""
        return trainable_parameters(self.model)

    @property
    def half_precision(self) -> bool:
        """Whether any of the model's weights, or its forwards, are in 16 bits."""
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in self.model.parameters()):
            return True
        with self.autocast():
            return torch.is_autocast_enabled(self.device.type)

    def microbatches(self, batch: RolloutBatch) -> Iterator[MicroBatch]:
        """The sequences of a batch as inputs of the model.

        Raises:
            DataError: the model has no room for one of them.
        """
        check_batch(self.model, batch)
        return microbatches(batch, self.microbatch_size, self.device)

    def hidden_states(self, head: OutputHead, inputs: MicroBatch) -> Tensor:
        """Hidden states `(n, D_model)` that predict the microbatch's `n` response tokens."""
        arguments = {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "use_cache": False,
        }
        with head.capture() as captured, self.autocast(), standing_in(self.model, self.values or {}):
            output = self.model(**arguments)
        with self.autocast():
            head.check(captured[-1], output.logits)
        hidden = captured[-1]  # on the output layer's device, which need not be the inputs'
        return hidden[inputs.row.to(hidden.device), inputs.column.to(hidden.device)]


def score_tokens(
    policy: Policy, batch: RolloutBatch, progress: Progress | None = None, basis: FeatureBasis | None = None
) -> TokenScores:
    """Teacher-forced log-prob and exact entropy of every response token, without gradients.

    Args:
        policy: the policy, at the weights to score with.
        batch: `B` responses.
        progress: called after each microbatch.
        basis: also give the features of states and tokens that control variates are made of.

    Returns:
        `(B, T)` arrays in float64 on the CPU. A value does not depend on the microbatch size beyond rounding.

    Raises:
        RolloutError: all responses are empty.
        NumericalError: a score is not finite.
    """
    collector = Collector(batch, progress)
    with torch.no_grad():
        for chunk in scored_chunks(policy, batch, basis):
            collector.add(chunk.sequence, chunk.position, *chunk.values)
            collector.advance(chunk.finished)
    return collector.finish()


@dataclass(frozen=True)
class ScoredChunk:
    """Scores of `n` response tokens, as a pass comes by them.

    Attributes:
        sequence: index of each token's sequence, `(n,)`, CPU.
        position: its position in the response, `(n,)`, CPU.
        values: `(l, h)`, both `(n,)`, and with a basis the expected token features `(n, K)` and the state features
            `(n, K_state)` as well.
        finished: number of sequences that this chunk completes.
    """

    sequence: Tensor
    position: Tensor
    values: tuple[Tensor, ...]
    finished: int


def scored_chunks(
    policy: Policy, batch: RolloutBatch, basis: FeatureBasis | None = None
) -> Iterator[ScoredChunk]:
    """Run the policy over a batch and yield its scores a few tokens at a time, in whatever grad mode is on."""
    head = OutputHead(policy.model, policy.values)
    for inputs in policy.microbatches(batch):
        hidden = policy.hidden_states(head, inputs)
        for rows in torch.arange(len(inputs.labels)).split(policy.head_chunk_tokens):
            states = hidden[rows.to(hidden.device)]
            labels = inputs.labels[rows].to(hidden.device)
            logp = token_log_probs(head.logits(states), policy.temperature)
            values: tuple[Tensor, ...] = token_statistics(logp, labels)
            if basis is not None:
                values = (*values, *basis.of(logp, states))
            last = int(rows[-1]) == len(inputs.labels) - 1
            yield ScoredChunk(
                inputs.sequence[rows], inputs.position[rows], values, inputs.size if last else 0
            )


def token_gradients(
    policy: Policy,
    batch: RolloutBatch,
    weights: TokenWeights,
    objectives: int,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Tensor]], TokenScores]:
    """Gradients of `sum_(i,t) a_k[i,t] l[i,t] + b_k[i,t] h[i,t]` for `k = 1..K`, the weights being constants.

    Since the weights are constants, the gradient of a chunk's logits is taken as soon as they exist: each chunk goes
    through the output head once, and the network below it is run once forward and `K` times backward.

    Args:
        policy: the policy; gradients are with respect to `policy.parameters`.
        batch: `B` responses.
        weights: gives the weights, see `TokenWeights`.
        objectives: `K`.
        progress: called after each microbatch.

    Returns:
        `K` dictionaries of gradients by parameter name (shape and type of the parameter; the parameters' own `.grad`
        is not touched), and the scores seen on the way.

    Raises:
        RolloutError: all responses are empty.
        NumericalError: there is nothing to train, or a score or gradient is not finite.
    """
    parameters = policy.parameters
    if not parameters:
        raise NumericalError("expected trainable parameters, found none with requires_grad=True")
    totals = _Totals(parameters, objectives)
    collector = Collector(batch, progress)
    head = OutputHead(policy.model)
    with torch.enable_grad():
        for inputs in policy.microbatches(batch):
            hidden = policy.hidden_states(head, inputs)
            through_head = _head_gradients(policy, head, hidden, inputs, weights, totals, collector)
            _network_gradients(hidden, through_head, totals)
            collector.advance(inputs.size)
    return totals.finish(), collector.finish()


def _head_gradients(
    policy: Policy,
    head: OutputHead,
    hidden: Tensor,
    inputs: MicroBatch,
    weights: TokenWeights,
    totals: _Totals,
    collector: Collector,
) -> list[Tensor]:
    """Gradients `(n, D_model)` of each objective by `hidden`, in float32 or better; the head's own go to `totals`."""
    own = {n: p for n, p in totals.parameters.items() if any(p is q for q in head.layer.parameters())}
    objectives = len(totals.values)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    grads = [torch.zeros_like(hidden, dtype=dtype) for _ in range(objectives)]
    for rows in torch.arange(len(inputs.labels)).split(policy.head_chunk_tokens):
        on_device = rows.to(hidden.device)
        leaf = hidden.detach()[on_device].to(dtype).requires_grad_()
        labels = inputs.labels[rows].to(hidden.device)
        logprob, entropy = token_statistics(token_log_probs(head.logits(leaf), policy.temperature), labels)
        sequence, position = inputs.sequence[rows], inputs.position[rows]
        a, b = weights(sequence, position, *collector.add(sequence, position, logprob, entropy)[:2])
        for k in range(objectives):
            value = (a[k].to(logprob) * logprob + b[k].to(entropy) * entropy).sum()
            more = k < objectives - 1
            found = torch.autograd.grad(value, [leaf, *own.values()], retain_graph=more, allow_unused=True)
            grads[k][on_device] = found[0]
            totals.add(k, own, found[1:])
    return grads


def _network_gradients(hidden: Tensor, grads: list[Tensor], totals: _Totals) -> None:
    """Carry the gradients by `hidden` down the network and add them to `totals`."""
    if not hidden.requires_grad:  # only the output layer is trainable
        return
    parameters = list(totals.parameters.values())
    for k, grad in enumerate(grads):
        scale = float16_scale(grad) if hidden.dtype == torch.float16 else 1.0
        found = torch.autograd.grad(
            hidden,
            parameters,
            grad_outputs=(grad * scale).to(hidden.dtype),
            retain_graph=k < len(grads) - 1,
            allow_unused=True,
        )
        totals.add(k, totals.parameters, found, scale)


def float16_scale(grad: Tensor) -> float:
    """The power of two that brings the largest entry of a gradient to about 1.

    Weights are of the order of one over the number of tokens, or of an entropy in nats: float16 flushes the former to
    zero in the layers below and overflows on the latter. A power of two is undone without rounding.

    >>> float16_scale(torch.tensor([0.1, -0.26]))
    2.0
    """
    largest = float(grad.abs().max())
    return 2.0 ** -math.frexp(largest)[1] if largest > 0 else 1.0


class _Totals:
    """The gradients of the objectives, summed over microbatches."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], objectives: int) -> None:
        self.parameters = parameters
        self.values = [
            {name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(objectives)
        ]

    def add(self, k: int, names: Iterable[str], grads: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """Add gradients of the objective `k`, which were multiplied by `scale`."""
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                self.values[k][name] += grad / scale if scale != 1.0 else grad

    def finish(self) -> list[dict[str, Tensor]]:
        """The gradients, checked."""
        for values in self.values:
            for name, total in values.items():
                if not bool(torch.isfinite(total).all()):
                    raise NumericalError(
                        f"expected finite gradients, found NaN or infinity in that of {name}"
                    )
        return self.values


class Collector:
    """Gathers what a pass finds per token into arrays `(B, T, ...)` and reports progress."""

    def __init__(self, batch: RolloutBatch, progress: Progress | None) -> None:
        """Start empty.

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
        self._done = int((batch.lengths == 0).sum())

    def add(self, sequence: Tensor, position: Tensor, *values: Tensor) -> list[Tensor]:
        """Store values `(n, ...)` of tokens; returns them detached, on the CPU, in float64."""
        found = [x.detach().to("cpu", torch.float64) for x in values]
        if not self._arrays:
            self._arrays = [
                torch.zeros(*self._mask.shape, *x.shape[1:], dtype=_storage(k)) for k, x in enumerate(found)
            ]
        for array, x in zip(self._arrays, found, strict=True):
            array[sequence, position] = x.to(array.dtype)
        return found

    def advance(self, count: int) -> None:
        """Report `count` more sequences."""
        self._done += count
        if self._progress is not None and count:
            self._progress(self._done, len(self._mask))

    def arrays(self) -> list[Tensor]:
        """What was gathered, checked.

        Raises:
            NumericalError: a value is not finite.
        """
        for name, values in zip(("log-prob", "entropy"), self._arrays, strict=False):
            bad = ~torch.isfinite(values)
            if bool(bad.any()):
                i, t = (int(x) for x in bad.nonzero()[0])
                raise NumericalError(
                    f"expected finite scores, found a {name} of {values[i, t]} at sequence {i}, token {t} "
                    f"({int(bad.sum())} in all); check the weights and checkpoint.dtype"
                )
        return self._arrays

    def finish(self) -> TokenScores:
        """The scores."""
        logprob, entropy, *features = self.arrays()
        expected, states = features or (None, None)
        return TokenScores(logprob, entropy, self._mask, expected, states)


def _storage(k: int) -> torch.dtype:
    """What is differenced is kept in float64: log-probs, entropies, expected features. State features need less."""
    return torch.float64 if k < 3 else torch.float32
