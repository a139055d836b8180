"""What to do, in the words of a run and in those of a training.

A run has a configuration file, and may take another step. In a training there is no such file, and the step is the
training's own: it is what is to be measured, not what may be changed for the measurement's sake. What finds a fault
names a remedy and does not know who reads it; who shows the sentence chooses the words.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

Audience = Literal["run", "training"]


class Remedy(Enum):
    """A setting, or what to do with it: the words of a run, and those of a training."""

    B_E = "batch_config.B_E", "B_E"
    MAX_NEW_TOKENS = "generation.max_new_tokens", "max_new_tokens"
    TOKENIZER = "checkpoint.tokenizer_path", "tokenizer"
    ATTENTION = "checkpoint.attn_implementation", "attn_implementation"
    WEIGHT_TYPE = "checkpoint.dtype", "the weights' type"
    FLOAT32 = "checkpoint.dtype: float32", "float32 weights"
    FLOAT64 = "checkpoint.dtype: float64", "float64 weights"
    DIFFERENCES = "probe_rework.derivative_mode: finite_difference", "derivative: finite_difference"
    NO_DIFFERENCES = "probe_rework.derivative_mode: jvp or reverse", "derivative: jvp"
    DERIVATIVE = "probe_rework.derivative_mode", "derivative"
    OTHER_DERIVATIVE = (
        "use auto, reverse or finite_difference, or checkpoint.attn_implementation: eager",
        "use auto or finite_difference, or load the model with attn_implementation eager",
    )
    PROMPTS_AS_TEXTS = (
        "use a chat model's tokenizer (checkpoint.tokenizer_path), or give the prompts as texts (use_chat_template: "
        "false, and a prompt_template)",
        "use a chat model's tokenizer, or give the prompts as texts",
    )
    MEMORY = (
        "lower memory_config.head_chunk_tokens, generation.batch_size or generation.max_new_tokens, or take "
        "checkpoint.dtype: bfloat16 or checkpoint.load_in_4bit: true",
        "take a smaller head_chunk_tokens or max_new_tokens",
    )
    SMALLER_STEP = "lower probe_rework.learning_rate", "the step is large"
    SMALLER_STEP_CAN_BE_MEASURED = ("lower probe_rework.learning_rate", "a smaller step can be measured")
    SMALLER_STEP_OR_LARGER_E = "lower probe_rework.learning_rate or raise batch_config.B_E", "raise B_E"
    SMALLER_STEP_SHOWS = "lower probe_rework.learning_rate: ", ""
    LARGER_STEP = "raise probe_rework.learning_rate", "read the mean over several probes"
    OR_LARGER_STEP = "or raise probe_rework.learning_rate", "as does the mean over several probes"
    LARGER_STEP_OR = "raise probe_rework.learning_rate, or ", ""

    def __init__(self, run: str, training: str) -> None:
        """Args: `run` and `training`, the words of each."""
        self.run, self.training = run, training

    def words(self, audience: Audience) -> str:
        """The words for those who read them."""
        return self.run if audience == "run" else self.training


@dataclass(frozen=True)
class Message:
    """A sentence with remedies in it; as a text it has the words of a run."""

    parts: tuple[str | Remedy, ...]

    def words(self, audience: Audience) -> str:
        """The sentence for those who read it.

        >>> Message(("few responses; raise ", Remedy.B_E, ".")).words("training")
        'few responses; raise B_E.'
        """
        return "".join(part if isinstance(part, str) else part.words(audience) for part in self.parts)

    def __str__(self) -> str:
        """The words of a run."""
        return self.words("run")
