"""Where the parts of a checkpoint stand: model or adapter, optimizer state, tokenizer, step."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError
from probe.loading.deepspeed import deepspeed_folder
from probe.loading.foreign import check_folder, read_json_object
from probe.loading.layouts import (
    GATHER,
    LIGHTNING,
    PICKLED_WEIGHTS,
    SAVE_ADVICE,
    foreign_message,
    refuse_foreign_layout,
)
from probe.loading.rank_files import has_rank_files
from probe.loading.sharded import is_sharded

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
REFERENCE_ADAPTER = "ref"
"""The adapter in which TRL keeps a copy of the one that a training started from, and the folder it is saved in."""
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
SHARDED_OPTIMIZERS = ("optimizer_0", "optimizer")
"""Folders of torch.distributed.checkpoint, as accelerate and others name them under FSDP."""
TRAINER_STATE = "trainer_state.json"
TRAINING_ARGS = "training_args.bin"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class CheckpointFiles:
    """The parts of one checkpoint, all of them existing files and folders.

    Attributes:
        kind: `lora` for a PEFT adapter, `full` for a whole model.
        model_dir: folder with the adapter or the model.
        optimizer_file: file with the optimizer's `state_dict`, or its folder of torch.distributed.checkpoint.
        tokenizer_dirs: folders of the checkpoint that hold a tokenizer, best first; may be empty.
        name: short label for file names and tables (`step_60`, `checkpoint-60`).
        step: the training step, from trainer_state.json or the name; None where neither says.
        trainer_state_file: trainer_state.json of transformers' Trainer, or None.
        training_args_file: training_args.bin of transformers' Trainer or TRL: the checkpoint's, else that of the folder
            around a `checkpoint-N`; or None.
    """

    kind: Literal["lora", "full"]
    model_dir: Path
    optimizer_file: Path
    tokenizer_dirs: tuple[Path, ...]
    name: str
    step: int | None
    trainer_state_file: Path | None
    training_args_file: Path | None = None

    @property
    def next_update(self) -> int | None:
        """The number of the update after the checkpoint's, which is in its weights and moments; None if not known."""
        return None if self.step is None else self.step + 1


def locate_checkpoint(config: CheckpointConfig) -> CheckpointFiles:
    """Find the parts of the checkpoint that `config.checkpoint_path` names. Nothing is loaded.

    Three layouts are understood: `.../checkpoint` with `model/` and `optimizer.pt` in it, the same given as
    `.../checkpoint/model`, and a flat `checkpoint-N` as transformers' Trainer and TRL write it.

    Args:
        config: the `checkpoint` section.

    Returns:
        The files found.

    Raises:
        CheckpointError: a part is missing, ambiguous, pickled, or in a format of another framework; the
            message lists what was looked for.
    """
    root = _existing_folder(config.checkpoint_path)
    kind, model_dir = _find_model(root)
    # `model/` is a part of its parent folder; any other folder is a checkpoint of its own.
    container = model_dir.parent if model_dir.name == "model" else model_dir
    folders = tuple(dict.fromkeys((model_dir, container)))
    for folder in folders:
        check_folder(folder)
    optimizer_file = _find_optimizer(folders, config.optimizer_path)
    states = [folder / TRAINER_STATE for folder in folders if (folder / TRAINER_STATE).is_file()]
    trainer_state_file = states[0] if states else None
    return CheckpointFiles(
        kind=kind,
        model_dir=model_dir,
        optimizer_file=optimizer_file,
        tokenizer_dirs=tuple(folder for folder in folders if _has_any(folder, TOKENIZER_FILES)),
        name=container.name,
        step=_training_step(trainer_state_file, container.name),
        trainer_state_file=trainer_state_file,
        training_args_file=_find_training_args(folders, container),
    )


def read_trainer_state(file: Path) -> dict:
    """The content of a trainer_state.json.

    Args:
        file: the file.

    Returns:
        The JSON object.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    return read_json_object(file, "JSON as transformers' Trainer writes it")


def _existing_folder(path: str | None) -> Path:
    if not path:
        raise CheckpointError(
            "checkpoint.checkpoint_path: expected the folder of a checkpoint (or `demo`), found nothing"
        )
    # The user's own spelling is kept (a link `latest` stays `latest`), only made absolute.
    root = _absolute(path, "checkpoint.checkpoint_path")
    if root.suffix == ".ckpt":
        raise CheckpointError(foreign_message("a Lightning checkpoint", root, LIGHTNING))
    if root.is_file():
        raise CheckpointError(
            f"checkpoint.checkpoint_path: expected a folder, found the file {root}; {SAVE_ADVICE}, into one folder"
        )
    if not root.is_dir():
        raise CheckpointError(f"Checkpoint not found: checkpoint.checkpoint_path: there is no folder {root}")
    return root


def _absolute(path: str, key: str) -> Path:
    """The path that a setting names; a name that no file can have is an error of that setting."""
    try:
        absolute = Path(os.path.abspath(Path(path).expanduser()))
        absolute.exists()
    except (RuntimeError, ValueError, OSError) as error:  # no such user, a null byte, a name that is too long
        raise CheckpointError(f"{key}: expected a path, found {path!r:.80} ({error!s:.80})") from error
    return absolute


def _find_model(root: Path) -> tuple[Literal["lora", "full"], Path]:
    candidates = (root, root / "model")
    for folder in candidates:
        if (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file():
            return "lora", folder
        # A PEFT folder may hold the base model's config.json as well, so the adapter is tried first.
        if (folder / MODEL_CONFIG).is_file() and _has_any(folder, MODEL_WEIGHTS):
            return "full", folder
    for folder in candidates:
        pickled = [name for name in PICKLED_WEIGHTS if (folder / name).is_file()]
        if pickled:
            raise CheckpointError(
                f"Checkpoint not usable: expected safetensors weights in {folder}, found the pickle "
                f"{pickled[0]}, which can run code when it is loaded; load it where you trust it and save it "
                "again with `save_pretrained`"
            )
        lone = [name for name in (*MODEL_WEIGHTS, ADAPTER_WEIGHTS) if (folder / name).is_file()]
        if lone:
            config = ADAPTER_CONFIG if lone[0] == ADAPTER_WEIGHTS else MODEL_CONFIG
            raise CheckpointError(
                f"Checkpoint not usable: expected {config} beside {folder / lone[0]}, found none (accelerate's "
                "`save_state` writes none); save the unwrapped model with `save_pretrained`"
            )
        index = folder / "adapter_model.safetensors.index.json"
        if index.is_file():
            raise CheckpointError(foreign_message("an adapter in several parts", index, GATHER))
    nested = sorted(
        str(file.parent) for depth in ("*", "*/*") for file in root.glob(f"{depth}/{ADAPTER_CONFIG}")
    )
    for folder in (root, root.parent if root.name == "model" else root):
        if not nested:
            refuse_foreign_layout(folder)
    looked_for = ", ".join(
        f"{folder}/{name}"
        for folder in candidates
        for name in (
            f"{ADAPTER_CONFIG} + {ADAPTER_WEIGHTS}",
            f"{MODEL_CONFIG} + {MODEL_WEIGHTS[0]} (or its index)",
        )
    )
    hint = (
        f"; adapters stand in {', '.join(nested[:5])}: give that folder, and checkpoint.optimizer_path"
        if nested
        else ""
    )
    raise CheckpointError(
        f"Checkpoint not found: no adapter or model in {root}; looked for {looked_for}{hint}"
    )


def _find_optimizer(folders: tuple[Path, ...], given: str | None) -> Path:
    if given is not None:
        file = _absolute(given, "checkpoint.optimizer_path")
        if file.suffix == ".ckpt":
            raise CheckpointError(foreign_message("a Lightning checkpoint", file, LIGHTNING))
        if file.is_dir():
            if is_sharded(file) or deepspeed_folder(file) is not None or has_rank_files(file):
                return file
            refuse_foreign_layout(file)
            raise CheckpointError(f"checkpoint.optimizer_path: expected a file, found the folder {file}")
        if not file.is_file():
            raise CheckpointError(f"checkpoint.optimizer_path: expected an existing file, found no {file}")
        return file
    # verl keeps adapter and model in folders beside its shards
    beside = [folders[0].parent] if folders[0].name in ("lora_adapter", "huggingface") else []
    found = []
    for folder in (*folders, *beside):
        # `optimizer.bin` is what accelerate and, under FSDP, the Trainer write; a folder's first name wins.
        whole = [folder / name for name in OPTIMIZER_FILES if (folder / name).is_file()]
        whole = whole or [folder / name for name in SHARDED_OPTIMIZERS if is_sharded(folder / name)]
        whole = whole or [one for one in [deepspeed_folder(folder)] if one is not None]
        found += (whole or [folder] * has_rank_files(folder))[:1]
    if len(found) > 1:
        raise CheckpointError(
            f"Optimizer state is ambiguous: expected one file, found {', '.join(map(str, found))}; name the "
            "right one in checkpoint.optimizer_path"
        )
    if not found:
        for folder in (*folders, *beside):
            refuse_foreign_layout(folder)
        looked_for = ", ".join(str(folder / name) for folder in folders for name in OPTIMIZER_FILES)
        raise CheckpointError(
            f"Optimizer state not found: looked for {looked_for}; name the file in checkpoint.optimizer_path"
        )
    return found[0]


def _find_training_args(folders: tuple[Path, ...], container: Path) -> Path | None:
    real = container.resolve()
    # Only a `checkpoint-N` is known to belong to what lies in the folder around it.
    around = (real.parent,) if re.fullmatch(r"checkpoint-\d+", real.name) else ()
    found = [folder / TRAINING_ARGS for folder in (*folders, *around) if (folder / TRAINING_ARGS).is_file()]
    return found[0] if found else None


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _training_step(trainer_state_file: Path | None, name: str) -> int | None:
    if trainer_state_file is not None:
        step = read_trainer_state(trainer_state_file).get("global_step")
        if isinstance(step, int):
            return step
    match = re.search(r"(?:^|[-_.])(\d+)$", name)
    return int(match.group(1)) if match else None
