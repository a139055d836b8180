"""The parts of a log that are made from a run's state; each returns plain Python values.

Shapes: `B` sequences, `T` response positions. Numbers made for reading are rounded to 6 (tables) or 9
(sequences and tokens) significant digits; the raw arrays are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probe.estimand import SEQUENCE, TOKEN
from probe.logs.distributions import RECORD_DIGITS, TABLE_DIGITS, mean_or_none, rounded

if TYPE_CHECKING:
    from probe.data.batch import RolloutBatch
    from probe.estimators.estimate import Estimate, Estimates
    from probe.phases.attribution import Attribution
    from probe.phases.state import ProbeState


CONTRIBUTIONS = tuple(
    f"contribution_{name}" for name in ("deltaH1", "deltaH1_tok", "state_fixed", "state_fixed_tok", "deltaR1")
)
"""What the policy-gradient term of a token adds to each number of an attribution; without rewards not to the last."""


def influences(state: ProbeState) -> dict[str, Estimate]:
    """The reported estimates from E whose errors are influences of its prompts, by key.

    An estimate that has more prompts than E (with a fresh sample beside it) is none of E alone.
    """
    if state.E is None:
        return {}
    found: dict[str, Estimates] = {}
    if state.prediction is not None and state.prediction.estimates:
        found["deltaH1"] = state.prediction.total
    if state.ground_truth is not None:
        found |= {"H_orig": state.ground_truth.H_orig, "deltaH_true": state.ground_truth.change}
    prompts = len(state.E.group.unique())
    return {
        estimand.key(name): both[estimand]
        for estimand in (SEQUENCE, TOKEN)
        for name, both in found.items()
        if len(both[estimand].influence) == prompts
    }


def group_table(U: RolloutBatch) -> dict[str, list[Any]]:
    """One row per group of U (the responses to one draw of a prompt), as columns of equal length."""
    ids, member = torch.unique(U.group, return_inverse=True)
    rows = [(member == k).nonzero().flatten() for k in range(len(ids))]
    table: dict[str, list[Any]] = {
        "group": ids.tolist(),
        "size": [len(row) for row in rows],
        "length_mean": [mean_or_none(U.lengths.double()[row]) for row in rows],
        "truncated": [int(U.truncated[row].sum()) for row in rows],
    }
    if U.rewards is not None:
        rewards = [U.rewards[row] for row in rows]
        rewards = [values[~values.isnan()] for values in rewards]  # those to which a reward applies
        table["reward_mean"] = [mean_or_none(values) if len(values) else None for values in rewards]
        for name in ("min", "max"):
            table[f"reward_{name}"] = [
                rounded(getattr(values, name)(), TABLE_DIGITS) if len(values) else None for values in rewards
            ]
    if U.advantages is not None:
        table["zero_advantage"] = [not bool(U.advantages[row].any()) for row in rows]
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
        if name == "E":
            section["E_rollouts"] = state.drawn.config.batch_config.E_rollouts
            section["influence_fit"] = {
                key: one.fit.tolist() for key, one in influences(state).items() if len(one.fit)
            }
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


def token_records(
    state: ProbeState,
    texts: bool,
    token_text: Callable[[int], str] | None,
    batches: Sequence[str] = ("E", "U"),
) -> dict[str, Any]:
    """For every sequence of E and U its tokens in order, as columns of equal length.

    Args:
        state: what the run produced.
        texts: whether token ids and token texts are included.
        token_text: the text of one token id; without it the texts are left out.
        batches: names of those that are wanted.
    """
    section: dict[str, Any] = {}
    for name, batch in (("E", state.E), ("U", state.U)):
        if batch is None or name not in batches:
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


def _per_sequence(state: ProbeState, name: str) -> dict[str, Tensor]:
    """The `(B,)` arrays of batch `name` besides what its scores give."""
    found: dict[str, Tensor | None] = {}
    if name == "E" and state.ground_truth is not None:
        found = {
            "importance_weight": state.ground_truth.weights.weights,
            "log_weight": state.ground_truth.weights.log_weights,
        }
    batch = state.E if name == "E" else state.U
    if name == "E" and state.E is not None:
        group = state.E.group
        found |= {f"influence_{key}": one.by_response(group) for key, one in influences(state).items()}
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
    if name == "U" and state.attribution is not None:
        found |= _by_sequence(state.attribution)
    return {key: rounded(values, RECORD_DIGITS) for key, values in found.items()}


def influence_table(state: ProbeState) -> dict[str, Any] | None:
    """What the tokens of every response of U do to the entropy at the states of sampled responses of E, nats."""
    found = state.attribution
    if found is None or found.influence is None or found.influence_rows is None:
        return None
    return {
        "responses_of_E": found.influence_rows.tolist(),
        "nats": [rounded(row, RECORD_DIGITS) for row in found.influence],
    }


def _by_sequence(found: Attribution) -> dict[str, Tensor]:
    """Contributions of the tokens of every response of U, summed."""
    sums = [one.change.parts for one in found.by_response]
    table = torch.tensor([[part.value for part in parts] for parts in sums], dtype=torch.float64)
    return dict(zip(CONTRIBUTIONS, table.T, strict=False))


def _token_arrays(state: ProbeState, name: str) -> dict[str, Tensor]:
    """The `(B, T)` arrays of batch `name`."""
    found: dict[str, Tensor | None] = {}
    if name == "E":
        if state.E_scores is not None:
            found |= {"logprob_before": state.E_scores.logprob, "entropy_before": state.E_scores.entropy}
        if state.ground_truth is not None:
            new = state.ground_truth.scores_new
            found |= {"logprob_after": new.logprob, "entropy_after": new.entropy}
        X = state.entropy_gradient
        if X is not None and state.E is not None and X.responses == len(state.E):
            found["score_weight_entropy"] = X.weights.entropy
            found["score_weight_length"] = X.weights.length
    elif state.update is not None:
        found |= {
            "logprob_before": state.update.scores.logprob,
            "entropy_before": state.update.scores.entropy,
        }
        found["loss_weight"] = state.update.loss_weights
        if state.attribution is not None:
            found |= dict(zip(CONTRIBUTIONS, state.attribution.contributions.by_token(), strict=False))
    batch = state.E if name == "E" else state.U
    if batch is not None:
        found |= {"old_logprob": batch.old_logprobs, "sampling_logprob": batch.sampling_logprobs}
    return {key: values for key, values in found.items() if values is not None}
