"""Checkpoints as other tools lay them out: recognised, and what to do with them."""

from __future__ import annotations

from pathlib import Path

from probe.errors.exceptions import CheckpointError

PICKLED_WEIGHTS = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")
SAVE_ADVICE = (
    "save the model with `save_pretrained` and the optimizer with `torch.save(optimizer.state_dict(), ...)`"
)
GATHER = f"gather it in one process and {SAVE_ADVICE}"
LIGHTNING = (
    "gather it in one process where it is a folder of shards (`python -m lightning.pytorch.utilities."
    "consolidate_checkpoint`), load it in the training's own LightningModule, save its model with `save_pretrained`, "
    "and its `optimizer_states[0]` with torch.save as optimizer.pt"
)
_DEEPSPEED = (
    "gather the weights in one process with its own `zero_to_fp32.py . OUT --safe_serialization`, into a folder with "
    "their config.json or adapter_config.json; the optimizer of ZeRO is read as it is, name the folder with its files "
    "(global_stepN) in checkpoint.optimizer_path"
)
_FSDP = (
    "gather it in one process: weights with `accelerate merge-weights`, into a folder with their config.json or "
    "adapter_config.json; the optimizer is read as it is, name its folder `optimizer_0` with `.metadata` in it in "
    "checkpoint.optimizer_path (or train with state_dict_type FULL_STATE_DICT, which writes optimizer.bin)"
)
_VERL = (
    "gather the weights in one process with `python -m verl.model_merger merge --backend fsdp`; the optimizer is read "
    "as it is (optim_world_size_N_rank_R.pt, of FSDP2), name the folder with its files in checkpoint.optimizer_path"
)
_DCP = (
    "gather it in one process: weights (`torch.distributed.checkpoint.format_utils.dcp_to_torch_save`, then "
    "`save_pretrained`); an optimizer is read as it is, name its folder with `.metadata` in it in "
    "checkpoint.optimizer_path"
)
_TO_TRANSFORMERS = "convert the weights to transformers' format with its own export tool"
_FOREIGN_LAYOUTS = (
    ("*.ckpt", "a Lightning checkpoint", LIGHTNING),
    ("global_step*/*optim_states.pt", "DeepSpeed optimizer shards", _DEEPSPEED),
    ("*_optim_states.pt", "DeepSpeed optimizer shards", _DEEPSPEED),
    ("global_step*/*model_states.pt", "DeepSpeed model shards", _DEEPSPEED),
    ("*/global_step*/*_states.pt", "DeepSpeed shards", _DEEPSPEED),
    ("*_model_states.pt", "DeepSpeed model shards", _DEEPSPEED),
    ("optimizer_*/*.distcp", "a sharded FSDP optimizer", _FSDP),
    ("pytorch_model_fsdp*/*.distcp", "a sharded FSDP model", _FSDP),
    ("pytorch_model_fsdp*.bin", "an FSDP model as a pickle", _FSDP),
    ("optim_world_size_*_rank_*.pt", "verl's FSDP optimizer shards", _VERL),
    ("model_world_size_*_rank_*.pt", "verl's FSDP model shards", _VERL),
    ("actor/*_world_size_*_rank_*.pt", "verl's FSDP shards", _VERL),
    ("*.distcp", "a torch.distributed.checkpoint folder", _DCP),
    ("*/*.distcp", "a torch.distributed.checkpoint folder", _DCP),
    ("*/*/*.distcp", "a torch.distributed.checkpoint folder", _DCP),
    ("rank*-of-*-optimizer.pt", "an optimizer sharded by rank", GATHER),
    ("adapter_model-*-of-*.safetensors", "an adapter in several parts", GATHER),
    ("mp_rank_*/model_optim_rng.pt", "a Megatron checkpoint", _TO_TRANSFORMERS),
    ("iter_*/mp_rank_*/model_optim_rng.pt", "a Megatron checkpoint", _TO_TRANSFORMERS),
    ("recipe_state*/recipe_state.pt", "a torchtune checkpoint", _TO_TRANSFORMERS),
    ("recipe_state.pt", "a torchtune checkpoint", _TO_TRANSFORMERS),
    ("hf_model_*.pt", "a torchtune checkpoint", _TO_TRANSFORMERS),
    ("adapters.safetensors", "an MLX adapter", _TO_TRANSFORMERS),
    ("*.gguf", "a GGUF file", "name the model it was made from"),
    ("*.nemo", "a NeMo archive", _TO_TRANSFORMERS),
    ("consolidated*.pth", "weights in their authors' format", _TO_TRANSFORMERS),
    ("consolidated*.safetensors", "weights in their authors' format", _TO_TRANSFORMERS),
    ("tf_model.h5", "TensorFlow weights", _TO_TRANSFORMERS),
    ("flax_model.msgpack", "Flax weights", _TO_TRANSFORMERS),
    ("_CHECKPOINT_METADATA", "an Orbax checkpoint", _TO_TRANSFORMERS),
)


def refuse_foreign_layout(folder: Path) -> None:
    """Refuse the folder of another tool.

    Raises:
        CheckpointError: it is one; with what to do.
    """
    for pattern, what, how in _FOREIGN_LAYOUTS:
        match = next(iter(sorted(folder.glob(pattern))), None)
        if match is not None:
            raise CheckpointError(foreign_message(what, match, how))


def foreign_message(what: str, file: Path, how: str) -> str:
    """The message for a checkpoint of another tool."""
    return (
        f"Checkpoint not usable: expected an adapter or model folder with optimizer.pt, found {what} "
        f"({file}); {how}"
    )
