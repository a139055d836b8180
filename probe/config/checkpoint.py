"""Which policy is probed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from probe.errors.exceptions import require


@dataclass(frozen=True)
class CheckpointConfig:
    """Which policy is probed, and how it is loaded."""

    checkpoint_path: str | None = None
    """Folder of the checkpoint: `.../checkpoint` or `.../checkpoint/model` (with `optimizer.pt` beside `model/`), or a
    flat `checkpoint-N` as transformers' Trainer and TRL write it. `demo` is the built-in demo policy."""
    optimizer_path: str | None = None
    """File with the optimizer's `state_dict`, or a folder of FSDP's (`optimizer_0`) or DeepSpeed's (`global_stepN`); by
    default found from `checkpoint_path`."""
    backbone: str | None = None
    """Base model of an adapter: a short name (`qwen2_5_15`), a hub id or a local folder. Default: the adapter's own."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer; by default the checkpoint's, else the base model's."""
    revision: str | None = None
    """Hub revision of the base model."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Type of the frozen weights. Trainable weights are always kept in float32 or better."""
    load_in_4bit: bool = False
    """Quantise the frozen base with bitsandbytes (QLoRA)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants as well."""
    device_map: str | None = None
    """`device_map` of `from_pretrained` (for example `auto`); by default Fabric's device holds the whole model."""
    attn_implementation: str | None = None
    """Attention implementation of `from_pretrained` (`sdpa`, `eager`, ...); by default the best the model supports."""
    optimizer: Literal["auto", "adam", "adamw"] = "auto"
    """Which rule the saved Adam moments belong to; `auto` reads it from the state (AdamW where it does not say)."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be loaded."""
        require(
            not (self.load_in_4bit and self.dtype == "float64"),
            "checkpoint.dtype",
            "float32, bfloat16 or float16 with load_in_4bit",
            self.dtype,
        )


DEMO = "demo"
"""Value of `checkpoint.checkpoint_path` that names the built-in demo policy (a folder of that name is `./demo`)."""
