"""What gradient, step and entropy gradient are in each parameter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probe.estimand import SEQUENCE, TOKEN
from probe.logs.distributions import FLOAT32_DIGITS, TABLE_DIGITS, rounded
from probe.shards import whole

if TYPE_CHECKING:
    from probe.phases.state import ProbeState


def parameter_blocks(
    statistics: Mapping[str, Mapping[str, Any]], limit: int = 48
) -> dict[str, list[Any]] | None:
    """`parameter_statistics` by blocks of parameters, as columns of equal length; None for no statistics.

    A block is a layer (the name up to its first number), or the module of a parameter outside the layers. Of
    more than `limit` blocks the ones that move the most are listed, and the last row adds up the others, so
    that the columns stay complete.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, numbers in statistics.items():
        row = rows.setdefault(_block(name), {"numbers": 0})
        row["numbers"] += numbers["numbers"]
        for column, value in numbers.items():
            if column.endswith("_norm"):
                row[column] = row.get(column, 0.0) + value**2
            elif column.startswith("contribution"):
                row[column] = row.get(column, 0.0) + value
    if not rows:
        return None
    if len(rows) > limit:
        rows = _with_the_rest_added_up(rows, limit)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table: dict[str, list[Any]] = {"block": list(rows)}
    for column in columns:
        values = torch.tensor([row.get(column, torch.nan) for row in rows.values()], dtype=torch.float64)
        if column == "numbers":
            table[column] = values.long().tolist()
        else:
            table[column] = rounded(values.sqrt() if column.endswith("_norm") else values, TABLE_DIGITS)
    return table


def parameter_statistics(state: ProbeState) -> dict[str, dict[str, Any]]:
    """Per parameter: its shape, norm and largest entry of step, gradient and X, and its part of `<X, step>`.

    `contribution` (nats per response) and `contribution_tok` (nats per token) add up to the inner product of
    X and the step, computed in float64.
    """
    vectors = _vectors(state)
    table: dict[str, dict[str, Any]] = {}
    for name, shape in _parameter_shapes(state).items():
        row: dict[str, Any] = {"shape": list(shape), "numbers": shape.numel()}
        found = {vector: whole(get(name)).cpu() for vector, get in vectors.items()}
        for vector, tensor in found.items():
            row[f"{vector}_norm"] = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
            row[f"{vector}_max_abs"] = float(tensor.abs().max()) if tensor.numel() else 0.0
        for estimand in (SEQUENCE, TOKEN):
            vector = estimand.key("X")
            if "step" in found and vector in found:
                part = (found[vector].double() * found["step"].double()).sum()
                row[estimand.key("contribution")] = float(part)
        table[name] = row
    return table


def raw_vectors(state: ProbeState, limit: int) -> dict[str, Any]:
    """The vectors X, gradient and step, flattened by parameter; only their size if above `limit` numbers."""
    vectors, shapes = _vectors(state), _parameter_shapes(state)
    numbers = len(vectors) * sum(shape.numel() for shape in shapes.values())
    section: dict[str, Any] = {"numbers": numbers, "limit": limit, "included": numbers <= limit}
    if numbers > limit:
        section["reason"] = f"{numbers} numbers are more than {limit}; `parameters` has their norms"
        return section
    for vector, get in vectors.items():
        section[vector] = {name: rounded(whole(get(name)).cpu().flatten(), FLOAT32_DIGITS) for name in shapes}
    return section


def _vectors(state: ProbeState) -> dict[str, Callable[[str], Tensor]]:
    """The parameter-sized vectors that there are: for each a function from a parameter's name to its part."""
    found: dict[str, Callable[[str], Tensor]] = {}
    if state.update is not None:
        found |= {"step": state.update.step.__getitem__, "gradient": state.update.gradient.__getitem__}
    if state.entropy_gradient is not None:
        gradient = state.entropy_gradient
        found |= {SEQUENCE.key("X"): gradient.sequence, TOKEN.key("X"): gradient.token}
    return found


def _parameter_shapes(state: ProbeState) -> dict[str, torch.Size]:
    """The shape of every trainable parameter, as far as a phase has seen them."""
    if state.update is not None:
        return {name: step.shape for name, step in state.update.step.items()}
    if state.entropy_gradient is not None:
        return {name: part.shape for name, part in state.entropy_gradient.total.items()}
    return {}


def _with_the_rest_added_up(rows: dict[str, dict[str, Any]], limit: int) -> dict[str, dict[str, Any]]:
    """The `limit - 1` rows that move the most, in their order, and the sum of the others."""

    def size(name: str) -> float:
        return abs(rows[name].get("contribution", rows[name].get("step_norm", 0.0)))

    kept = set(sorted(rows, key=size, reverse=True)[: limit - 1])
    rest = [row for name, row in rows.items() if name not in kept]
    total: dict[str, Any] = {}
    for row in rest:
        for column, value in row.items():
            total[column] = total.get(column, 0) + value
    return {name: row for name, row in rows.items() if name in kept} | {f"({len(rest)} others)": total}


def _block(name: str) -> str:
    """The block that a parameter belongs to.

    >>> _block("model.layers.12.mlp.up_proj.lora_A.weight"), _block("lm_head.weight")
    ('model.layers.12', 'lm_head')
    """
    layer = re.match(r"(.*?\.\d+)\.", name)
    return layer.group(1) if layer else name.rpartition(".")[0] or name
