"""Options of sampling under which responses are not those of the policy itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# fmt: off
NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "typical_p": (1.0,), "top_h": (), "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,), "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,),
    "presence_penalty": (0.0,), "frequency_penalty": (0.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "bad_words_ids": ([],), "bad_words": ([],), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (), "sequence_bias": ({},),
    "logit_bias": ({},), "allowed_token_ids": ([],), "exponential_decay_length_penalty": (), "guidance_scale": (1.0,),
    "watermarking_config": (), "min_length": (0,), "min_new_tokens": (0,), "min_tokens": (0,), "num_beams": (1,),
    "do_sample": (True,), "penalty_alpha": (0.0,), "dola_layers": (), "structured_outputs": (), "guided_decoding": (),
    "stop": ([],), "stop_strings": ([],), "prompt_lookup_num_tokens": (), "constraints": ([],),
    "force_words_ids": ([],), "renormalize_logits": (False,), "logits_processors": ([],),
}
# fmt: on
"""Options of sampling under which the trainer's distribution is not the policy's own, and the values that change
nothing; None never does."""


# fmt: off
ENDS: dict[str, tuple[Any, ...]] = {
    "stop_token_ids": ([],), "ignore_eos": (False,), "eos_token_id": (), "max_tokens": (), "max_length": (),
    "max_time": (), "stop_regex": ([],),
}
# fmt: on
"""Keyword arguments of engines that end a response in another way, and the values that change nothing."""


# fmt: off
WITHOUT_EFFECT = (
    "temperature", "max_new_tokens", "seed", "n", "logprobs", "prompt_logprobs", "skip_special_tokens",
    "spaces_between_special_tokens", "detokenize", "include_stop_str_in_output", "use_cache", "cache_implementation",
    "pad_token_id", "bos_token_id", "disable_compile", "output_scores", "output_logits", "return_dict_in_generate",
    "tokenizer", "synced_gpus",
)
# fmt: on
"""Keyword arguments of engines that are judged elsewhere or change no response."""


def changed_ends(kwargs: Mapping[str, Any], cap: Any = None) -> dict[str, Any]:
    """The keyword arguments with which a response ends otherwise than by EOS, a stop string or the cap.

    Args:
        kwargs: of an engine.
        cap: the most tokens of a response; an engine's own name for the same number changes nothing.

    Example:
        >>> changed_ends({"max_tokens": 64, "ignore_eos": False}, 64), changed_ends({"stop_token_ids": [5]})
        ({}, {'stop_token_ids': [5]})
    """
    return {
        name: value
        for name, value in kwargs.items()
        if name in ENDS
        and value is not None
        and value not in ENDS[name]
        and not (name == "max_tokens" and value == cap)
    }


def changed_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make sampling another distribution than softmax(logits / temperature).

    Example:
        >>> changed_sampling({"top_p": 0.9, "top_k": 0, "min_p": None, "max_new_tokens": 5})
        {'top_p': 0.9}
    """
    return {
        name: value
        for name, value in options.items()
        if name in NEUTRAL_SAMPLING and value is not None and value not in NEUTRAL_SAMPLING[name]
    }
