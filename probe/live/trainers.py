"""What a trainer of TRL's does with prompts and with the distribution it samples from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from probe.data.batch import PromptExample
from probe.errors import DataError
from probe.live.attach import few_of, prompt_examples
from probe.live.report import say
from probe.live.words import in_own_words
from probe.text import error_text

IMAGES = ("image", "images")
"""Columns that TRL puts into prompts as pictures."""
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


def sampling_changes(trainer: Any) -> dict[str, Any]:
    """The options that make the trainer's sampling another distribution than softmax(logits / temperature).

    Args:
        trainer: with `args` of GRPO's kind; `generation_kwargs` there and the trainer's `generation_config` count too.

    Returns:
        Values by name; empty where the trainer samples from the policy itself, or not at all.
    """
    args = trainer.args
    if getattr(args, "max_completion_length", None) is None:
        return {}
    given = {name: getattr(args, name, None) for name in NEUTRAL_SAMPLING}
    kwargs = getattr(args, "generation_kwargs", None)
    kwargs = dict(kwargs) if isinstance(kwargs, Mapping) else {}
    config = getattr(trainer, "generation_config", None)
    effective = {} if config is None else {name: getattr(config, name, None) for name in NEUTRAL_SAMPLING}
    # GRPO's own options and its keyword arguments are in the configuration already, unless another engine samples
    merged = {**given, **{name: x for name, x in effective.items() if x is not None}, **kwargs}
    found = {
        name: value
        for name, value in merged.items()
        if name in NEUTRAL_SAMPLING and value is not None and not _neutral(value, NEUTRAL_SAMPLING[name])
    }
    if "temperature" in kwargs and kwargs["temperature"] != getattr(args, "temperature", None):
        found["temperature"] = kwargs["temperature"]
    return found


def _neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(value == one for one in neutral)


def trainer_prompts(trainer: Any, prompts: Iterable[Any], tokenizer: Any, seed: int) -> list[PromptExample]:
    """The prompts as the trainer itself gives them to the policy.

    Trainers of TRL that sample have a tokenisation of their own, with tools, processors, content in parts and options
    of the chat template; E's prompts go through it one by one. Those that it cannot turn into text alone (pictures)
    are left out, and it is said how many.

    Args:
        trainer: any transformers trainer.
        prompts: texts, message lists, examples, or rows with a column `prompt`.
        tokenizer: for trainers without a tokenisation of their own.
        seed: of the draw where there are many prompts.

    Raises:
        DataError: none of the prompts can be used.
    """
    encode = getattr(trainer, "_tokenize_prompts", None)
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        return prompt_examples(prompts, tokenizer, seed)  # which says what is wrong
    found: list[PromptExample] = []
    failed: list[str] = []
    for index, prompt in enumerate(few_of(prompts, seed)):
        try:
            with in_own_words():
                if isinstance(prompt, PromptExample) or not callable(encode):
                    found += prompt_examples([prompt], tokenizer, seed)
                else:
                    found.append(_encoded(trainer, encode, prompt, tokenizer, index))
        except Exception as error:  # chat templates are programs: they raise what they like
            failed.append(f"prompts[{index}]: {error_text(error)}")
    if not found:
        reason = failed[0] if failed else "there are none"
        raise DataError(
            f"prompts: expected at least one that can be given to the policy as text, found none ({reason}); give "
            "the probe prompts of its own: EntropyProbeTrainerCallback(trainer, prompts=[...])"
        )
    if failed:
        say(f"{len(failed)} of {len(failed) + len(found)} prompts are left out ({failed[0]})", warn=True)
    if getattr(trainer, "tools", None):
        say(
            "the trainer's rollouts call tools; responses of E end where the first call would be answered",
            warn=True,
        )
    return found


def _encoded(trainer: Any, encode: Any, prompt: Any, tokenizer: Any, index: int) -> PromptExample:
    """A prompt by the trainer's own tokenisation.

    Raises:
        DataError: it is empty, or has pictures in it.
    """
    row = dict(prompt) if isinstance(prompt, Mapping) else {}
    if isinstance(prompt, Mapping):
        if any(row.get(name) not in (None, []) for name in IMAGES):
            raise DataError("expected a prompt of text alone, found one with pictures")
        if "prompt" not in row:
            raise DataError(f"expected a column `prompt`, found {', '.join(map(str, row))}")
        prompt = row["prompt"]
    if isinstance(prompt, str) and not prompt.strip():
        raise DataError("expected a prompt, found an empty text")
    if getattr(trainer, "environment_factories", None) is not None:
        raise DataError("expected a prompt of the data's own, found a trainer whose environments complete it")
    answer = encode([prompt])
    ids, pictures = (answer[0], answer[1]) if isinstance(answer, tuple) else (answer, None)
    if pictures is not None:
        raise DataError("expected a prompt of text alone, found one with pictures")
    numbers = tuple(int(i) for i in ids[0])
    if not numbers:
        raise DataError("expected at least one token, found none")
    return PromptExample(tokenizer.decode(list(numbers)), row, index, False, numbers)
