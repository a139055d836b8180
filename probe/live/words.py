"""Sentences of the verdict and of errors in the words of a running training.

They name settings of an offline run, and advise another learning rate. Here there is no configuration file, and the
step is the training's own: it is what is to be measured, not what may be changed for the measurement's sake.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from probe.errors.exceptions import ProbeError

OWN_WORDS: tuple[tuple[str, str], ...] = (
    ("; lower probe_rework.learning_rate or raise batch_config.B_E", "; raise B_E"),
    ("; lower probe_rework.learning_rate: what is curvature", "; what is curvature"),
    ("; lower probe_rework.learning_rate: curvature", "; curvature"),
    ("; lower probe_rework.learning_rate", "; the step is large"),
    ("(lower probe_rework.learning_rate)", "(a smaller step can be measured)"),
    (", or raise probe_rework.learning_rate", ", as does the mean over several probes"),
    (": raise probe_rework.learning_rate", ": read the mean over several probes"),
    ("; raise probe_rework.learning_rate, or set", "; set"),
    ("probe_rework.learning_rate", "the learning rate"),
    ("probe_rework.derivative_mode: jvp or reverse", "derivative: jvp"),
    ("probe_rework.derivative_mode", "derivative"),
    ("batch_config.B_E", "B_E"),
    ("generation.max_new_tokens", "max_new_tokens"),
    ("generation.temperature", "temperature"),
    ("checkpoint.dtype: float32", "float32 weights"),
    ("checkpoint.dtype: float64", "float64 weights"),
    ("checkpoint.dtype", "the weights' type"),
    ("checkpoint.attn_implementation", "attn_implementation"),
    ("memory_config.", ""),
    (
        "use a chat model's tokenizer (checkpoint.tokenizer_path), or give the prompts as texts (use_chat_template: "
        "false, and a prompt_template)",
        "use a chat model's tokenizer, or give the prompts as texts",
    ),
    ("checkpoint.tokenizer_path", "tokenizer"),
    ("batch_config.", ""),
)
"""What is replaced by what, in this order."""


def own_words(text: str) -> str:
    """A sentence in the words of a running training.

    >>> own_words("contains 0; batch_config.B_E of about 100 excludes 0, or raise probe_rework.learning_rate.")
    'contains 0; B_E of about 100 excludes 0, as does the mean over several probes.'
    """
    for theirs, own in OWN_WORDS:
        text = text.replace(theirs, own)
    return text


@contextmanager
def in_own_words() -> Iterator[None]:
    """The package's errors in the words of a running training."""
    try:
        yield
    except ProbeError as error:
        error.args = tuple(own_words(x) if isinstance(x, str) else x for x in error.args)
        raise
