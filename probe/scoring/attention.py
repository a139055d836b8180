"""Attention a block of queries at a time, in the model's own arithmetic and in memory that grows with the length.

What can be differentiated in forward mode computes the score of every query with every key, `(B, heads, L, L)`, several
times over. The softmax is over the keys of one query, so that blocks of queries are independent of each other: the
function that a model calls for all queries is called for a few of them, with the keys that they see, and the outputs
put together are the same. Sequences of up to `WHOLE` tokens, and what cannot be cut, are computed as ever.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

logger = logging.getLogger(__name__)

WHOLE = 384
"""Queries up to which attention is computed at once, which is as fast there: the choice depends on the length alone."""
MOST_ROWS = 128
"""Queries that are computed at a time at most: few enough to leave out the keys that none of them sees."""
CELLS = 2**22
"""Scores of queries with keys, over sequences and heads, that are computed at a time."""
FEWEST_ROWS = 32
"""Queries that are computed at a time however many keys and heads there are."""
IMPLEMENTATION = "_attn_implementation_internal"
"""Attribute of a transformers configuration that says by which function its attention runs."""
_NAMES = ("sdpa", "eager")
_NOT_BY_QUERY = ("s_aux", "position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments of attention functions that are tensors, and the same for every block of queries."""
_TABLE = "ALL_ATTENTION_FUNCTIONS"

Attention = Callable[..., tuple[Tensor, Any]]
Block = tuple[Tensor | None, int, int]


class ByQueries(str):
    """Name of an implementation: the model's own to code that compares it, another to a table that looks it up."""

    __slots__ = ()

    def __hash__(self) -> int:
        """Not that of the plain name, beside which it is registered."""
        return hash((ByQueries, str(self)))


def attention_by_queries(model: nn.Module) -> Callable[[Any], ByQueries | None]:
    """What names the implementation, block by block, of a configuration's attention.

    Args:
        model: a transformers model, possibly wrapped.

    Returns:
        A function of a configuration; None for those whose attention stays as it is. Why that is so is logged.
    """
    kinds = {type(module) for module in model.modules()}
    callers = {kind for kind in kinds if _calls_table(kind) is not None}
    names = tuple(name for name in _NAMES if all(_own(kind, name) is not None for kind in callers))
    held = {getattr(vars(module).get("config"), IMPLEMENTATION, None) for module in model.modules()} - {None}
    what = ", ".join(sorted(kind.__name__ for kind in kinds if issubclass(kind, PreTrainedModel)))
    if held and not callers:
        _say_whole(f"{what}: its attention does not go through transformers' table of attention functions")
    elif foreign := sorted(str(name) for name in held - set(names)):
        _say_whole(f"{what}: attention by {', '.join(foreign)} is not cut into blocks of queries")

    def name_of(config: Any) -> ByQueries | None:
        name = getattr(config, IMPLEMENTATION, None)
        return ByQueries(name) if callers and name in names else None

    return name_of


@cache
def _say_whole(reason: str) -> None:
    """Say once that the memory of forward mode grows with the square of the length."""
    logger.info("forward mode computes attention at once, in memory that grows like length^2: %s", reason)


# ---------------------------------------------------------------- what a model calls


def _calls_table(kind: type) -> Any:
    """The method in which a class of modules looks its attention function up; None where there is none."""
    if issubclass(kind, PreTrainedModel):  # which checks names of implementations
        return None
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            method = inspect.unwrap(value) if inspect.isfunction(value) else None
            if _TABLE in getattr(getattr(method, "__code__", None), "co_names", ()):
                return method
    return None


def _own(kind: type, name: str) -> Attention | None:
    """The attention function that a class of modules calls under a name; None where that cannot be told.

    Eager attention is in no table: it is the function of the model's own file that the look-up falls back to.
    """
    method = _calls_table(kind)
    if method is None:
        return None
    if name != "eager":
        return method.__globals__[_TABLE].get(name)  # type: ignore[no-any-return]
    found = [n for n in method.__code__.co_names if n.endswith("eager_attention_forward")]
    return method.__globals__.get(found[0]) if len(found) == 1 else None


def _attention(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Attention as the model computes it under the name, a block of queries at a time.

    Args:
        name: of the implementation.
        module: the layer.
        query: `(B, heads, L, d)`.
        key: `(B, key heads, S, d)`.
        value: `(B, key heads, S, d_v)`.
        attention_mask: as the function of that name takes it, `(B or 1, heads or 1, L or 1, S)`.
        options: handed on.

    Returns:
        `(B, L, heads, d_v)`, and None for the weights where these were never there as a whole.
    """
    own = _own(type(module), name)
    if own is None:
        raise NotImplementedError(f"{type(module).__name__} calls an attention function that cannot be told")
    length, keys = query.shape[2], key.shape[2]
    if length <= WHOLE:
        return own(module, query, key, value, attention_mask, **options)
    if reason := _not_cut(module, attention_mask, options):
        _say_whole(f"{type(module).__name__}: {reason}")
        return own(module, query, key, value, attention_mask, **options)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and name == "sdpa":
        # what each query sees is in the blocks of the mask, or it sees everything
        options["is_causal"] = False
    cells = query.shape[1] * keys
    rows = min(max(CELLS // cells, FEWEST_ROWS), MOST_ROWS)
    sequences = max(CELLS // (rows * cells), 1)
    done = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        mask, low, high = _block(attention_mask, start, end, keys, name == "sdpa" and causal, query.device)
        parts = [
            own(module, q, k, v, m, **options)[0]
            for q, k, v, m in zip(
                query[:, :, start:end].split(sequences),
                key[:, :, low:high].split(sequences),
                value[:, :, low:high].split(sequences),
                _split(mask, sequences, len(query)),
                strict=True,
            )
        ]
        done.append(torch.cat(parts))
    return torch.cat(done, dim=1), None


def _not_cut(module: nn.Module, mask: Tensor | None, options: Mapping[str, Any]) -> str | None:
    """Why a call cannot be cut into blocks of queries; None where it can."""
    if mask is not None and mask.dim() != 4:
        return f"a mask of {mask.dim()} dimensions"
    if options.get("dropout"):
        return "dropout"
    if options.get("output_attentions"):
        return "the weights are asked for"
    plain = (int, float, bool, str, torch.dtype)
    for key, option in options.items():
        if option is not None and key not in _NOT_BY_QUERY and not isinstance(option, plain):
            return f"the argument {key}"
    return None


def _block(mask: Tensor | None, start: int, end: int, keys: int, causal: bool, device: torch.device) -> Block:
    """The mask of some queries, and the range of keys that it is for."""
    if isinstance(mask, MaskByQueries):
        low, high = mask.seen(start, end)
        return mask.block(start, end, low, high), low, high
    if mask is not None:
        return (mask if mask.shape[2] == 1 else mask[:, :, start:end]), 0, keys
    if not causal:
        return None, 0, keys
    high = min(end, keys)
    return torch.ones(1, 1, end - start, high, dtype=torch.bool, device=device).tril(start), 0, high


def _split(mask: Tensor | None, sequences: int, size: int) -> Iterator[Tensor | None]:
    """A mask for each few of `size` sequences."""
    for start in range(0, size, sequences):
        shared = mask is None or mask.shape[0] == 1
        yield mask if shared else mask[start : start + sequences]  # type: ignore[index]


# ---------------------------------------------------------------- masks


class MaskByQueries(Tensor):
    """A mask `(B, 1, L, S)` that is made for a few queries at a time, and as a whole for whoever computes with it.

    To the model's own code it is a tensor of the type and shape that its mask function makes, without the memory.
    """

    own: Callable[..., Tensor]
    arguments: Mapping[str, Any]
    ranges: dict[tuple[int, int], tuple[int, int]]

    @classmethod
    def of(cls, own: Callable[..., Tensor], arguments: Mapping[str, Any]) -> MaskByQueries:
        """The mask that a mask function of transformers makes of `arguments`, which have `q_length`."""
        always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        arguments = {**arguments, **always}
        one = own(**{**arguments, "q_length": 1, "kv_length": 1})
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        mask = one.new_zeros(()).expand(shape).as_subclass(cls)
        mask.own, mask.arguments, mask.ranges = own, arguments, {}
        return mask

    def block(self, start: int, end: int, low: int, high: int) -> Tensor:
        """The mask of the queries from `start` to `end` and the keys from `low` to `high`; `(B or 1, 1, ...)`."""
        place = self.arguments
        rows = self.own(
            **{
                **place,
                "q_length": end - start,
                "q_offset": place.get("q_offset", 0) + start,
                "kv_length": high - low,
                "kv_offset": place.get("kv_offset", 0) + low,
            }
        )
        # expanded over the sequences where it is the same for all
        return rows[:1] if rows.stride(0) == 0 else rows

    def seen(self, start: int, end: int) -> tuple[int, int]:
        """The range of keys outside of which none of the queries from `start` to `end` sees any."""
        if (start, end) not in self.ranges:
            keys = self.arguments["kv_length"]
            rows = self.block(start, end, 0, keys)
            visible = rows if rows.dtype == torch.bool else rows == 0
            columns = visible.any(0).any(0).any(0).nonzero()
            # a query that sees nothing may be given the mean of all keys
            whole = not bool(visible.any(-1).all())
            self.ranges[start, end] = (0, keys) if whole else (int(columns[0]), int(columns[-1]) + 1)
        return self.ranges[start, end]

    def whole(self) -> Tensor:
        """All of it."""
        return self.own(**self.arguments)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Shape and type are known; anything else is done with the whole mask."""
        options = dict(kwargs or {})
        if func not in _OF_SHAPE:
            _say_whole("the model's own code computes with the mask")
            args, options = tree_map(lambda x: x.whole() if isinstance(x, cls) else x, (args, options))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **options)


_OF_SHAPE = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dim,
    Tensor.size,
    Tensor.__len__,
}


def _mask(name: str, *args: Any, **arguments: Any) -> Any:
    """The mask that the implementation of that name takes; that of a long sequence is made when it is needed."""
    own = ALL_MASK_ATTENTION_FUNCTIONS[name]
    # a function that is not made of indices cannot be had for some of them, nor can older transformers' by cache
    if args or arguments.get("use_vmap") or arguments.get("q_length", 0) <= WHOLE:
        return own(*args, **arguments)
    return MaskByQueries.of(own, arguments)


for _name in _NAMES:
    AttentionInterface.register(ByQueries(_name), partial(_attention, _name))
    AttentionMaskInterface.register(ByQueries(_name), partial(_mask, _name))
