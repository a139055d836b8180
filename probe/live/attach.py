"""What is checked when the probe is attached: a run should not fail at step 500 for what was wrong at step 0."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probe.data.batch import PromptExample
from probe.errors.exceptions import ConfigError, in_words_of
from probe.live.optimizers import LISTED, moved_parameters, unwrapped_optimizers
from probe.live.prompts import prompt_examples, prompts_with_room
from probe.live.say import say
from probe.live.settings import WatchSettings
from probe.live.zero import ZeroOptimizer, is_engine
from probe.loading.quantization import find_4bit_layers
from probe.parameters import without_adapters
from probe.scoring.room import Room
from probe.shards import resharded, why_not

PROBE_CHECKPOINTS = (
    "probe its checkpoints with `entropy-probe run`: weights gathered into a folder as `save_pretrained` writes it, "
    "and the optimizer of FSDP, gathered (FULL_STATE_DICT) or sharded, or of DeepSpeed's ZeRO"
)
"""The way that is left where parameters are sharded."""
_FULL_BYTES = 4
"""Bytes of a float32 number."""


@dataclass(frozen=True)
class Attachment:
    """What a watch is attached to, all of it checked.

    Attributes:
        model: the policy, unwrapped.
        optimizers: those that make an update together, unwrapped.
        parameters: the trainable parameters that they move, by name.
        left_out: names of the trainable parameters that they do not.
        tokenizer: the probe's own copy, since encoding sets its padding and truncation.
        prompts: what E's prompts are drawn from.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    parameters: dict[str, nn.Parameter]
    left_out: list[str]
    tokenizer: Any
    prompts: list[PromptExample]


def checked_attachment(
    model: Any, optimizer: Any, prompts: Iterable[Any], tokenizer: Any, settings: WatchSettings
) -> Attachment:
    """What a watch can be attached to; see `watch` for the arguments.

    Raises:
        ConfigError: model, optimizer or tokenizer cannot be used.
        DataError: the prompts cannot be used.
        RolloutError: no prompt leaves room for a response.
    """
    model, optimizers = unwrapped_model(model), unwrapped_optimizers(optimizer)
    parameters, left_out = watched_parameters(model, optimizers)
    check_tokenizer(tokenizer, model)
    own_tokenizer = copy.deepcopy(tokenizer)
    with in_words_of("training"):
        examples = prompt_examples(prompts, own_tokenizer, settings.seed)
        examples = prompts_with_room(examples, model, own_tokenizer, settings.max_new_tokens)
    return Attachment(model, optimizers, parameters, left_out, own_tokenizer, examples)


def say_attached(attachment: Attachment, mode: str, reason: str) -> None:
    """Say what is watched, and what of it is not as one might expect.

    Args:
        attachment: of the watch.
        mode: how deltaH1 is differentiated.
        reason: why in this way.
    """
    parameters, left_out = attachment.parameters, attachment.left_out
    count = sum(p.numel() for p in parameters.values())
    say(f"watching {len(parameters)} trainable tensors ({count:,} numbers); deltaH1 by {mode}: {reason}")
    if left_out:
        say(
            f"{len(left_out)} trainable tensors are in no watched optimizer and taken as constant "
            f"({', '.join(left_out[:LISTED])}{', ...' if len(left_out) > LISTED else ''})",
            warn=True,
        )
    half = [name for name, p in parameters.items() if p.element_size() < _FULL_BYTES]
    if half:
        say(
            f"{len(half)} of {len(parameters)} trainable tensors are in 16 bits: steps below their resolution are "
            "rounded away in training itself; what is predicted and measured is the step that remains"
        )


def unwrapped_model(model: Any) -> nn.Module:
    """The policy inside of DistributedDataParallel, DeepSpeed's engine, `torch.compile` and Fabric's wrapper.

    Raises:
        ConfigError: it is no model that responses can be sampled from, or it is sharded or quantised in a way that the
            probe cannot handle.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch module, found {type(model).__name__}")
    while True:
        # Fabric's forward has autocast in it, and its attributes are those of the module inside
        inner = model._modules.get("_original_module", getattr(model, "_orig_mod", None))
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None and is_engine(model):
            inner = model._modules.get("module")
        if not isinstance(inner, nn.Module):
            break
        model = inner
    _refuse_sharded(model)
    _refuse_repacked(model)
    _refuse_no_policy(model)
    return model


def _refuse_no_policy(model: Any) -> None:
    """Only a causal language model has responses and their entropies."""
    config, name = getattr(model, "config", None), type(model).__name__
    lacking = [
        attribute
        for attribute in ("generate", "get_output_embeddings", "get_input_embeddings")
        if not callable(getattr(model, attribute, None))
    ]
    remedy = "give the policy itself, loaded with AutoModelForCausalLM (with peft around it or not)"
    if config is None or lacking:
        missing = "config" if config is None else lacking[0]
        raise ConfigError(
            f"model: expected a transformers causal language model, found {name} without {missing}; {remedy}"
        )
    base = without_adapters(model)
    generates = getattr(base, "can_generate", lambda: True)()
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"model: expected a causal (decoder-only) language model, found the encoder-decoder {name}; {remedy}"
        )
    for adapter in getattr(model, "peft_config", {}).values():
        # a prefix of keys and values moves no position; tokens put before the input do, in every pass anew
        if getattr(adapter, "is_prompt_learning", False) and str(adapter.peft_type.value) != "PREFIX_TUNING":
            raise ConfigError(
                f"model: expected an adapter of the model's weights (LoRA, say), found {adapter.peft_type.value}, "
                "which puts virtual tokens before every input; this is not supported"
            )
    if not generates or model.get_output_embeddings() is None:
        raise ConfigError(f"model: expected a model that generates text, found {name}; {remedy}")


def _refuse_sharded(model: nn.Module) -> None:
    """Parameters must be whole, or parts that `fully_shard` makes, real and on one device."""
    resharded(model)  # as an optimizer knows its parameters
    names = dict(model.named_parameters())
    shards = f"take FSDP2 (fully_shard; fsdp_version: 2), or {PROBE_CHECKPOINTS}"
    if (reason := why_not(model)) is not None:
        raise ConfigError(
            f"model: expected whole parameters, or parts that fully_shard makes, found {reason}; {shards}"
        )
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ConfigError(f"model: expected whole parameters, found {type(module).__name__}; {shards}")
        if type(module).__name__ == "Linear8bitLt":
            raise ConfigError(
                "model: expected weights in 4 bits or in floating point, found bitsandbytes' Linear8bitLt, whose "
                "forward changes its state; use load_in_4bit, or probe checkpoints with `entropy-probe run`"
            )
    for name, p in names.items():
        if hasattr(p, "ds_id"):
            raise ConfigError(
                f"model: expected whole parameters, found DeepSpeed ZeRO-3's in {name}; take ZeRO-1 or ZeRO-2, or "
                f"{shards.removeprefix('take ')}"
            )
        if p.device.type == "meta":
            raise ConfigError(f"model: expected parameters with values, found {name} on the meta device")
    devices = sorted({str(p.device) for p in names.values()})
    if len(devices) > 1:
        raise ConfigError(
            f"model: expected all parameters on one device, found {', '.join(devices)}; {shards}"
        )


def _refuse_repacked(model: nn.Module) -> None:
    """Weights in 4 bits must be as they were quantised."""
    for name, layer in find_4bit_layers(model).items():
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ConfigError(
                f"model: expected the 4-bit weight of {name} as it was quantised, found it repacked by an earlier "
                "forward of bitsandbytes in evaluation mode, after which gradients are wrong; load the model "
                "again, and do not run it in evaluation mode before"
            )


def watched_parameters(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """The trainable parameters of the model that the optimizers move, by name, and the names of those they do not.

    Raises:
        ConfigError: there are none.
    """
    moved = moved_parameters(optimizers)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError(
            "model: expected trainable parameters, found none with requires_grad=True; attach the probe after the "
            "adapter is added"
        )
    watched = {name: p for name, p in trainable.items() if id(p) in moved}
    left_out = [name for name in trainable if name not in watched]
    if not watched:
        raise ConfigError(
            f"optimizer: expected the model's {len(trainable)} trainable parameters in it, found none of them "
            f"({', '.join(left_out[:LISTED])}, ...); build the optimizer from this model's parameters, after peft has "
            "wrapped it"
        )
    return watched, left_out


def backward_hooks(
    parameters: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> list[str]:
    """The parameters that have hooks which run as soon as their gradient is there: such hooks can move them.

    Not those of DeepSpeed's, which reduce gradients.
    """
    if any(isinstance(one, ZeroOptimizer) for one in optimizers):
        return []
    return [name for name, p in parameters.items() if getattr(p, "_post_accumulate_grad_hooks", None)]


def check_tokenizer(tokenizer: Any, model: nn.Module) -> None:
    """The tokenizer must encode texts and know what ends a response.

    Raises:
        ConfigError: it does not, or its tokens are not the model's.
    """
    if tokenizer is None or not callable(tokenizer) or not hasattr(tokenizer, "batch_decode"):
        raise ConfigError(
            f"tokenizer: expected a transformers tokenizer, found {type(tokenizer).__name__}; give the one that "
            "belongs to the model"
        )
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ConfigError(
            "tokenizer: expected an EOS token, found none: responses could not end; set tokenizer.eos_token"
        )
    vocabulary = Room.of(model).tokens
    if tokenizer.eos_token_id >= vocabulary:
        raise ConfigError(
            f"tokenizer: expected tokens of the model's vocabulary of {vocabulary}, found EOS with the id "
            f"{tokenizer.eos_token_id}; give the tokenizer that belongs to the model"
        )
