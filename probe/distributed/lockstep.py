"""Forwards of a policy that is sharded over processes: each needs all of them, at the same time.

Every forward brings the parts of the weights together, layer by layer. So a process that has nothing to score runs one
too, of a single token, as long as another one has something left; and a process that moves its own part of the weights
moves that of all others' forwards. Before each forward every process says what it is about to do (a *turn*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from probe.distributed.ranks import Ranks
from probe.errors.exceptions import ForwardCutOffError, RanksApartError
from probe.shards import fully_sharded, is_shard, is_sharded, part, reset, resharded
from probe.snapshot import put_back_by
from probe.text import first_line

DONE, FORWARD, FORWARD_WITH_GRADIENTS, BACKWARD = range(4)
"""What a process is about to do."""
Collect = Callable[[int, float], None]
"""Takes the gradients of an objective, multiplied by a scale, from the parameters."""
_ACTIVE: WeakKeyDictionary[nn.Module, Lockstep] = WeakKeyDictionary()
_WARM: WeakSet[nn.Module] = WeakSet()
"""Models that have run."""


class Lockstep:
    """The turns of the processes that hold a sharded model."""

    def __init__(
        self,
        root: nn.Module,
        model: nn.Module,
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager[object]],
        collect: Collect | None,
    ) -> None:
        """See `lockstep`; `model` is the module that is called."""
        self._root = root
        self._model, self._ranks, self._autocast, self._collect = model, ranks, autocast, collect
        self._idle = False
        self.in_forward = False

    def turn(self, *own: int) -> list[int]:
        """Say what this process is about to do; returns what those do that are not done, with their least exponent.

        Args:
            own: what, the objective, whether it is the last one, and the exponent of a gradient's scale.

        Raises:
            Exception: what another process has raised.
            RanksApartError: two are about to do different things.
        """
        with self._ranks.together("a turn", own) as found:
            pass
        busy = [words for words in found if words[0] != DONE]
        about = {tuple(words[:3]) for words in busy}
        if len(about) > 1:
            raise RanksApartError(
                f"expected all {self._ranks.size} ranks to run a sharded policy in one way at a time, found them about "
                f"to do {sorted(about)} (1: a forward, 2: one with gradients, 3: a backward)"
            )
        return [*about.pop(), min(words[3] for words in busy)] if busy else [DONE]

    def before_forward(self, *_: Any) -> None:
        """Take a turn, on the way into a forward."""
        if self._idle:
            return
        self.begin_anew()  # where one has failed, on all processes
        self.turn(FORWARD_WITH_GRADIENTS if torch.is_grad_enabled() else FORWARD, 0, 0, 0)
        self.in_forward = True

    def begin_anew(self) -> None:
        """After a forward that has failed half way, let each process hold its own part again."""
        if self.in_forward:
            reset(self._root)
        self.in_forward = False

    def after_forward(self, *_: Any) -> None:
        """On the way out."""
        self.in_forward = False

    def backward(
        self, output: Tensor, grad: Tensor, objective: int, *, last: bool, exponent: int = 0
    ) -> None:
        """Carry a gradient by an output down to the parameters' `.grad`, of which `collect` then takes them.

        Args:
            output: of a forward.
            grad: by it.
            objective: its number.
            last: nothing more is asked of this forward's graph.
            exponent: of the power of two that the gradient may be multiplied by on the way; the least one of all
                processes is taken.
        """
        scale = 2.0 ** self.turn(BACKWARD, objective, int(last), exponent)[3]
        self._carry_down(output, (grad * scale).to(output.dtype), objective, scale, last=last)

    def _carry_down(self, output: Tensor, grad: Tensor, objective: int, scale: float, *, last: bool) -> None:
        """The backward itself, which all processes take at the same time."""
        self.in_forward = True
        torch.autograd.backward(output, grad, retain_graph=not last)
        self.in_forward = False
        if self._collect is not None:
            self._collect(objective, scale)

    def idle(self) -> None:
        """Keep the others company until all are done."""
        self._idle, output = True, None
        try:
            while (about := self.turn(DONE, 0, 0, 0))[0] != DONE:
                if about[0] == BACKWARD:
                    assert output is not None, "a backward follows a forward"
                    nothing, last = torch.zeros_like(output), bool(about[2])
                    self._carry_down(output, nothing, about[1], 2.0 ** about[3], last=last)
                    continue
                with torch.set_grad_enabled(about[0] == FORWARD_WITH_GRADIENTS), self._autocast():
                    output = one_token(self._model)
        finally:
            self._idle = False


def one_token(model: nn.Module) -> Tensor:
    """The logits of a forward as small as can be."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.zeros(1, 1, dtype=torch.int64, device=embedding.weight.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits  # type: ignore[no-any-return]


@contextmanager
def lockstep(
    model: nn.Module,
    ranks: Ranks,
    values: Mapping[str, Tensor] | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    collect: Collect | None = None,
    called: nn.Module | None = None,
) -> Iterator[Lockstep | None]:
    """Let a sharded model's forwards go in step with those of the other processes; others are left as they are.

    All processes that hold a part enter it and leave it together. In the meantime each part has its value of `values`,
    whoever runs a forward; in the end it is bitwise what it was. Where the block raises between forwards, all
    processes raise at their next turn.

    Args:
        model: any.
        ranks: all processes that hold a part of it.
        values: of parameters, by name; only shards count here.
        autocast: of the forwards.
        collect: takes the gradients of an objective from the parameters, after each backward.
        called: the module within the model that is called; the model itself by default. What of the root it leaves out
            is brought together once.

    Yields:
        The turns; None where the model is not sharded.

    Raises:
        ForwardCutOffError: a forward failed on this process while others wait for its part.
        RanksApartError: processes differ.
    """
    if not is_sharded(model):
        yield None
        return
    if model in _ACTIVE:
        if any(is_shard(v) for v in (values or {}).values()):
            raise RuntimeError(
                "expected one pass over a sharded policy at a time, found one inside of another"
            )
        yield _ACTIVE[model]
        return
    ranks.meet("lockstep")  # before anything that would wait for a process that has failed
    if model not in _WARM:  # the module that runs first is the root of all others
        with torch.no_grad(), autocast():
            one_token(model)
        _WARM.add(model)
    resharded(model)
    named = dict(model.named_parameters())
    moved = {name: value for name, value in (values or {}).items() if is_shard(value)}
    held = {name: part(named[name]).clone() for name in moved}

    def restore() -> None:
        resharded(model)
        for name, value in held.items():
            part(named[name]).copy_(value)

    with put_back_by(restore):
        for name, value in moved.items():
            part(named[name]).copy_(part(value))
        entered = model if called is None else called
        if entered is not model:
            fully_sharded(model)[0].unshard()
        step = Lockstep(model, entered, ranks, autocast, collect)
        with _in_turns(model, entered, step):
            yield step


@contextmanager
def _in_turns(model: nn.Module, entered: nn.Module, step: Lockstep) -> Iterator[None]:
    """Take a turn before each forward of `entered`, and stay until all processes are done."""
    handles = [
        entered.register_forward_pre_hook(step.before_forward, prepend=True),
        entered.register_forward_hook(step.after_forward),
    ]
    _ACTIVE[model] = step
    try:
        yield
        step.idle()
    except RanksApartError:
        raise
    except BaseException as error:
        within = step.in_forward
        step.begin_anew()
        if within and isinstance(error, Exception):
            raise ForwardCutOffError(
                "a forward of a policy that is sharded over processes failed on this one, while the others wait for "
                f"its part of the weights: {type(error).__name__}: {first_line(error)}"
            ) from error
        raise
    finally:
        del _ACTIVE[model]
        for handle in handles:
            handle.remove()


def is_apart(model: nn.Module) -> bool:
    """Whether a forward of a sharded model has failed half way: the other processes wait for this one's part."""
    return model in _ACTIVE and _ACTIVE[model].in_forward
