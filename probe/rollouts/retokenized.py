"""What a text says about the tokens that were sampled."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from probe.rollouts.ends import Doubt

_PIECE = "##"
"""What marks the continuation of a word in WordPiece vocabularies."""


class Recovery:
    """Says which texts do not lead back to the tokens that were sampled, or need not."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Args: `tokenizer` of the policy."""
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.get_vocab()
        self._special = set(tokenizer.all_special_ids) | set(
            getattr(tokenizer, "added_tokens_decoder", None) or ()
        )
        self._splits: dict[int, bool] = {}

    def doubts(self, text: str, ids: Sequence[int]) -> list[Doubt]:
        """The doubts about a text and the token ids that the tokenizer cuts it into.

        Args:
            text: a response.
            ids: its tokens.

        Returns:
            `text` where the tokens do not give the text back, or it holds the mark of a part of a character, which
            stands for many; `tokens` where one of the tokens can be cut into two others.
        """
        found: list[Doubt] = []
        back = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        if back != text or "\ufffd" in text:
            found.append("text")
        if any(self._is_divisible(token) for token in set(ids)):
            found.append("tokens")
        return found

    def _is_divisible(self, token: int) -> bool:
        """Whether a token's text can be sampled as two other tokens."""
        if token not in self._splits:
            name = str(self._tokenizer.convert_ids_to_tokens(token))
            known = self._vocabulary
            self._splits[token] = token not in self._special and any(
                name[:k] in known and (name[k:] in known or _PIECE + name[k:] in known)
                for k in range(1, len(name))
            )
        return self._splits[token]
