"""The parts of a log that are made from a run's state; each returns plain Python values.

Shapes: `B` sequences, `T` response positions. Numbers made for reading are rounded to 6 (tables) or 9
(sequences and tokens) significant digits; the raw arrays are not rounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from probe.data.batch import RolloutBatch
    from probe.state import ProbeState

TABLE_DIGITS = 6
RECORD_DIGITS = 9
# Nine significant digits give every float32 back exactly.
FLOAT32_DIGITS = 9

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def rounded(values: Tensor, digits: int) -> Any:
    """`values` as (nested) lists with `digits` significant digits; one number where there is no dimension.

    >>> rounded(torch.tensor([[1 / 3, 2.0]], dtype=torch.float64), 3)
    [[0.333, 2.0]]
    """
    if values.dim() > 1:
        return [rounded(row, digits) for row in values]
    plain = values.tolist()
    if not values.is_floating_point():
        return plain
    return [float(f"{x:.{digits}g}") for x in plain] if values.dim() else float(f"{plain:.{digits}g}")


def describe(values: Tensor) -> dict[str, Any] | None:
    """Count, mean, standard deviation (n - 1; NaN for one value), extremes, quantiles; None for no values.

    Non-finite values are counted under `non_finite`, and the other numbers are of the finite ones.

    >>> describe(torch.tensor([1.0, 2.0, 3.0]))["std"]
    1.0
    """
    values = values.flatten().double()
    finite = values[values.isfinite()]
    count = {"count": values.numel()}
    if finite.numel() < values.numel():
        count["non_finite"] = values.numel() - finite.numel()
    if finite.numel() == 0:
        return count if values.numel() else None
    # numpy's, since torch.quantile refuses more than 2**24 values.
    quantiles = torch.from_numpy(np.quantile(finite.numpy(), list(QUANTILES.values())))
    std = finite.std() if finite.numel() > 1 else finite.new_tensor(torch.nan)
    numbers = torch.stack([finite.mean(), std, finite.min(), *quantiles, finite.max()])
    names = ("mean", "std", "min", *QUANTILES, "max")
    return {**count, **dict(zip(names, rounded(numbers, TABLE_DIGITS), strict=True))}


def histogram(values: Tensor, bins: int = 16) -> dict[str, list[Any]] | None:
    """Counts in `bins` bins of equal width between the extremes; of the values themselves where they are few.

    Returns:
        `{"edges", "counts"}` with one edge more than counts; `{"values", "counts"}` where at most `bins`
        different values occur; None for no values or non-finite ones.

    >>> histogram(torch.tensor([0.0, 1.0, 1.0]))
    {'values': [0.0, 1.0], 'counts': [1, 2]}
    """
    values = values.flatten().double()
    if values.numel() == 0 or not bool(values.isfinite().all()):
        return None
    distinct, counts = torch.unique(values, return_counts=True)
    if len(distinct) <= bins:
        return {"values": rounded(distinct, TABLE_DIGITS), "counts": counts.tolist()}
    counts, edges = np.histogram(values.numpy(), bins=bins)
    return {"edges": rounded(torch.from_numpy(edges), TABLE_DIGITS), "counts": counts.tolist()}


def samples(state: ProbeState) -> dict[str, Tensor]:
    """The samples whose distributions are of interest, `(B,)` or one number per token, as far as they ran.

    The names are those of the log's `distributions`: `E/...` and `U/...`.
    """
    found: dict[str, Tensor] = {}
    if state.E is not None:
        found["E/length"] = state.E.lengths.double()
    if state.E_scores is not None:
        found["E/sequence_entropy_before"] = state.E_scores.sequence_entropy
        found["E/token_entropy_before"] = state.E_scores.entropy[state.E_scores.mask]
    if state.ground_truth is not None:
        new = state.ground_truth.scores_new
        found["E/sequence_entropy_after"] = new.sequence_entropy
        found["E/token_entropy_after"] = new.entropy[new.mask]
        found["E/importance_weight"] = state.ground_truth.weights.weights
        found["E/log_weight"] = state.ground_truth.weights.log_weights
    if state.U is not None:
        found["U/length"] = state.U.lengths.double()
        if state.U.rewards is not None:
            found["U/reward"] = state.U.rewards
        if state.U.advantages is not None:
            found["U/advantage"] = state.U.advantages
    if state.update is not None:
        found["U/sequence_entropy"] = state.update.scores.sequence_entropy
        found["U/token_entropy"] = state.update.scores.entropy[state.update.scores.mask]
    return found


def distributions(state: ProbeState) -> dict[str, Any]:
    """`describe` of every one of `samples`, with a histogram for lengths, rewards and weights."""
    with_histogram = ("E/length", "U/length", "U/reward", "E/importance_weight", "E/log_weight")
    tables: dict[str, Any] = {}
    for name, values in samples(state).items():
        tables[name] = describe(values)
        if name in with_histogram and tables[name] is not None:
            tables[name]["histogram"] = histogram(values)
    return tables


def group_table(U: RolloutBatch) -> dict[str, list[Any]]:
    """One row per group of U (the responses to one draw of a prompt), as columns of equal length."""
    ids, member = torch.unique(U.group, return_inverse=True)
    rows = [(member == k).nonzero().flatten() for k in range(len(ids))]
    table: dict[str, list[Any]] = {
        "group": ids.tolist(),
        "size": [len(row) for row in rows],
        "length_mean": [_mean(U.lengths.double()[row]) for row in rows],
        "truncated": [int(U.truncated[row].sum()) for row in rows],
    }
    if U.rewards is not None:
        rewards = [U.rewards[row] for row in rows]
        rewards = [values[~values.isnan()] for values in rewards]  # those to which a reward applies
        table["reward_mean"] = [_mean(values) if len(values) else None for values in rewards]
        for name in ("min", "max"):
            table[f"reward_{name}"] = [
                rounded(getattr(values, name)(), TABLE_DIGITS) if len(values) else None for values in rewards
            ]
    if U.advantages is not None:
        table["zero_advantage"] = [not bool(U.advantages[row].any()) for row in rows]
    return table


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
        found = {vector: get(name).detach().cpu() for vector, get in vectors.items()}
        for vector, tensor in found.items():
            row[f"{vector}_norm"] = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
            row[f"{vector}_max_abs"] = float(tensor.abs().max()) if tensor.numel() else 0.0
        for column, vector in (("contribution", "X"), ("contribution_tok", "X_tok")):
            if "step" in found and vector in found:
                row[column] = float((found[vector].double() * found["step"].double()).sum())
        table[name] = row
    return table


def prompt_table(state: ProbeState) -> tuple[list[dict[str, Any]], dict[tuple[int, ...], int]]:
    """Every different prompt of E and U once, with text and token ids; and where each stands, by its ids."""
    table: list[dict[str, Any]] = []
    position: dict[tuple[int, ...], int] = {}
    for batch in (state.E, state.U):
        if batch is None:
            continue
        for text, ids in zip(batch.prompts, batch.prompt_ids, strict=True):
            if ids not in position:
                position[ids] = len(table)
                table.append({"text": text, "ids": list(ids)})
    return table, position


def sequence_records(state: ProbeState, texts: bool, rows: bool = False) -> dict[str, Any]:
    """One record per sequence of E and U; with `texts` also prompts, completions and token ids.

    With `rows` each record has its prompt's token ids itself, as the row of a rollout file has.
    """
    section: dict[str, Any] = {}
    prompts, position = prompt_table(state)
    if texts:
        section["prompts"] = prompts
    for name, batch in (("E", state.E), ("U", state.U)):
        if batch is None:
            continue
        columns = _sequence_columns(state, name)
        lengths = batch.lengths.tolist()
        section[name] = []
        if batch.bias_flags:
            section.setdefault("bias_flags", {})[name] = list(batch.bias_flags)
        for i, ids in enumerate(batch.prompt_ids):
            record: dict[str, Any] = {"index": i, "group": int(batch.group[i]), "prompt": position[ids]}
            if texts:
                if rows:
                    record["prompt_ids"] = list(ids)
                record["completion"] = batch.completions[i]
                record["completion_ids"] = batch.completion_ids[i][batch.mask[i]].tolist()
            record |= {"length": lengths[i], "truncated": bool(batch.truncated[i])}
            if batch.doubts and batch.doubts[i]:
                record["doubts"] = list(batch.doubts[i])
            section[name].append(record | {column: values[i] for column, values in columns.items()})
    return section


def token_records(state: ProbeState, texts: bool, token_text: Callable[[int], str] | None) -> dict[str, Any]:
    """For every sequence of E and U its tokens in order, as columns of equal length.

    Args:
        state: what the run produced.
        texts: whether token ids and token texts are included.
        token_text: the text of one token id; without it the texts are left out.
    """
    section: dict[str, Any] = {}
    for name, batch in (("E", state.E), ("U", state.U)):
        if batch is None:
            continue
        arrays = _token_arrays(state, name)
        section[name] = []
        for i in range(len(batch)):
            mask = batch.mask[i]
            columns: dict[str, Any] = {"index": i}
            if texts:
                columns["id"] = batch.completion_ids[i][mask].tolist()
                if token_text is not None:
                    columns["text"] = [token_text(token) for token in columns["id"]]
            columns |= {key: rounded(values[i][mask], RECORD_DIGITS) for key, values in arrays.items()}
            section[name].append(columns)
    return section


def raw_arrays(state: ProbeState, texts: bool) -> dict[str, Any]:
    """The padded arrays of E and U as nested lists, unrounded; token ids only with `texts`."""
    section: dict[str, Any] = {}
    for name, batch in (("E", state.E), ("U", state.U)):
        if batch is None:
            continue
        arrays: dict[str, Any] = {"shape": list(batch.mask.shape), "mask": batch.mask.int().tolist()}
        if texts:
            arrays["completion_ids"] = batch.completion_ids.masked_fill(~batch.mask, 0).tolist()
        arrays |= {key: values.tolist() for key, values in _token_arrays(state, name).items()}
        arrays |= {key: values.tolist() for key, values in _per_sequence(state, name).items()}
        section[name] = arrays
    return section


def raw_vectors(state: ProbeState, limit: int) -> dict[str, Any]:
    """The vectors X, gradient and step, flattened by parameter; only their size if above `limit` numbers."""
    vectors, shapes = _vectors(state), _parameter_shapes(state)
    numbers = len(vectors) * sum(shape.numel() for shape in shapes.values())
    section: dict[str, Any] = {"numbers": numbers, "limit": limit, "included": numbers <= limit}
    if numbers > limit:
        section["reason"] = f"{numbers} numbers are more than {limit}; `parameters` has their norms"
        return section
    for vector, get in vectors.items():
        section[vector] = {
            name: rounded(get(name).detach().cpu().flatten(), FLOAT32_DIGITS) for name in shapes
        }
    return section


def _vectors(state: ProbeState) -> dict[str, Callable[[str], Tensor]]:
    """The parameter-sized vectors that there are: for each a function from a parameter's name to its part."""
    found: dict[str, Callable[[str], Tensor]] = {}
    if state.update is not None:
        found |= {"step": state.update.step.__getitem__, "gradient": state.update.gradient.__getitem__}
    if state.entropy_gradient is not None:
        found |= {"X": state.entropy_gradient.sequence, "X_tok": state.entropy_gradient.token}
    return found


def _parameter_shapes(state: ProbeState) -> dict[str, torch.Size]:
    """The shape of every trainable parameter, as far as a phase has seen them."""
    if state.update is not None:
        return {name: step.shape for name, step in state.update.step.items()}
    if state.entropy_gradient is not None:
        return {name: part.shape for name, part in state.entropy_gradient.pathwise.items()}
    return {}


def _per_sequence(state: ProbeState, name: str) -> dict[str, Tensor]:
    """The `(B,)` arrays of batch `name` besides what its scores give."""
    found: dict[str, Tensor | None] = {}
    if name == "E" and state.ground_truth is not None:
        found = {
            "importance_weight": state.ground_truth.weights.weights,
            "log_weight": state.ground_truth.weights.log_weights,
        }
    batch = state.E if name == "E" else state.U
    if batch is not None:
        found |= {"reward": batch.rewards, "advantage": batch.advantages}
    return {key: values for key, values in found.items() if values is not None}


def _sequence_columns(state: ProbeState, name: str) -> dict[str, Any]:
    """The columns of the per-sequence records of batch `name` that are numbers."""
    found: dict[str, Tensor] = {}
    old = state.E_scores if name == "E" else (state.update.scores if state.update is not None else None)
    if old is not None:
        found |= {"logprob_before": old.sequence_logprob, "entropy_before": old.sequence_entropy}
    if name == "E" and state.ground_truth is not None:
        new = state.ground_truth.scores_new
        found |= {"logprob_after": new.sequence_logprob, "entropy_after": new.sequence_entropy}
    found |= _per_sequence(state, name)
    return {key: rounded(values, RECORD_DIGITS) for key, values in found.items()}


def _token_arrays(state: ProbeState, name: str) -> dict[str, Tensor]:
    """The `(B, T)` arrays of batch `name`."""
    found: dict[str, Tensor | None] = {}
    if name == "E":
        if state.E_scores is not None:
            found |= {"logprob_before": state.E_scores.logprob, "entropy_before": state.E_scores.entropy}
        if state.ground_truth is not None:
            new = state.ground_truth.scores_new
            found |= {"logprob_after": new.logprob, "entropy_after": new.entropy}
        if state.entropy_gradient is not None:
            found["score_weight_entropy"] = state.entropy_gradient.weights.entropy
            found["score_weight_length"] = state.entropy_gradient.weights.length
    elif state.update is not None:
        found |= {
            "logprob_before": state.update.scores.logprob,
            "entropy_before": state.update.scores.entropy,
        }
        found["loss_weight"] = state.update.loss_weights
    batch = state.E if name == "E" else state.U
    if batch is not None:
        found |= {"old_logprob": batch.old_logprobs, "sampling_logprob": batch.sampling_logprobs}
    return {key: values for key, values in found.items() if values is not None}


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


def _mean(values: Tensor) -> float:
    """The mean, rounded for a table."""
    return float(rounded(values.mean(), TABLE_DIGITS))
