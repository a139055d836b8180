"""What a model has room for: the rows of its embedding and its positions.

Beyond them a forward fails in the middle, on a GPU by ending the process, or goes on with nonsense. So everything that
goes into the model passes here first: prompts before sampling, batches before scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import DataError, RolloutError
from probe.errors.remedies import Remedy


@dataclass(frozen=True)
class Room:
    """Limits of a model.

    Attributes:
        tokens: ids below this have a row in the embedding.
        positions: most tokens of a prompt and its response together; None where there is no limit.
    """

    tokens: int
    positions: int | None

    @classmethod
    def of(cls, model: Any) -> Room:
        """The limits of a transformers causal LM."""
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        positions = getattr(config, "max_position_embeddings", None)
        limited = isinstance(positions, int) and positions > 0
        return cls(int(model.get_input_embeddings().weight.shape[0]), positions if limited else None)

    def foreign(self, ids: Sequence[int]) -> int | None:
        """The first id that has no row; None where all have one."""
        if not ids or (min(ids) >= 0 and max(ids) < self.tokens):
            return None
        return next(i for i in ids if not 0 <= i < self.tokens)


def fitting_prompts(model: Any, prompts: Sequence[Sequence[int]], new: int) -> list[int]:
    """Indices of the prompts that leave the model positions for `new` tokens of a response."""
    room = Room.of(model)
    return [i for i, ids in enumerate(prompts) if room.positions is None or len(ids) + new <= room.positions]


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Refuse prompts that the model has no rows or, with the longest response allowed, no positions for.

    Args:
        model: the policy.
        prompts: token ids of each prompt.
        new: most tokens of a response.

    Raises:
        DataError: a token has no row.
        RolloutError: the longest prompt and response do not fit.
    """
    room = Room.of(model)
    for index, ids in enumerate(prompts):
        _check_tokens(room, ids, f"prompts[{index}]")
    longest = max(map(len, prompts))
    if room.positions is not None and longest >= room.positions:
        index = next(i for i, ids in enumerate(prompts) if len(ids) == longest)
        raise DataError(
            f"prompts[{index}]: expected fewer tokens than the {room.positions} positions of the model, found "
            f"{longest}; leave it out of the data"
        )
    if room.positions is not None and longest + new > room.positions:
        raise RolloutError(
            Remedy.MAX_NEW_TOKENS,
            f": expected at most {max(room.positions - longest, 0)} (the model has "
            f"{room.positions} positions and the longest prompt {longest} tokens), found {new}",
        )


def check_batch(model: Any, batch: RolloutBatch) -> None:
    """Refuse a batch with tokens that the model has no rows for, or longer than its positions.

    Args:
        model: the policy.
        batch: prompts and responses.

    Raises:
        DataError: one does not fit; the message names the sequence.
    """
    room = Room.of(model)
    sampled = batch.completion_ids[batch.mask]
    if len(sampled) and not (int(sampled.min()) >= 0 and int(sampled.max()) < room.tokens):
        for i in range(len(batch)):
            response = batch.completion_ids[i][batch.mask[i]].tolist()
            _check_tokens(room, response, f"the response of sequence {i} ({batch.source})")
    for i, (prompt, length) in enumerate(zip(batch.prompt_ids, batch.lengths.tolist(), strict=True)):
        where = f"sequence {i} ({batch.source})"
        _check_tokens(room, prompt, f"the prompt of {where}")
        if room.positions is not None and len(prompt) + length > room.positions:
            raise DataError(
                f"{where}: expected prompt and response to fit into the {room.positions} positions of the model, found "
                f"{len(prompt)} and {length} tokens; leave it out, or give the checkpoint that sampled it"
            )


def _check_tokens(room: Room, ids: Sequence[int], where: str) -> None:
    """Refuse ids without a row."""
    wrong = room.foreign(ids)
    if wrong is not None:
        raise DataError(
            f"tokenizer: expected tokens of the model's vocabulary of {room.tokens}, found the id {wrong} in {where}; "
            "give the tokenizer that belongs to the model (",
            Remedy.TOKENIZER,
            "), or call model.resize_token_embeddings after adding tokens",
        )
