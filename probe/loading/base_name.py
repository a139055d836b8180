"""Which base model is meant: short names, hub ids, folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError
from probe.loading.adapters import read_adapter_config
from probe.loading.checkpoint import ADAPTER_CONFIG, CheckpointFiles

_LONGEST_NAME = 1000
BACKBONES: dict[str, str] = {
    f"qwen2_5_{short}{suffix}": f"Qwen/Qwen2.5-{size}{ending}"
    for short, size in (
        ("05", "0.5B"),
        ("15", "1.5B"),
        ("3", "3B"),
        ("7", "7B"),
        ("14", "14B"),
        ("32", "32B"),
    )
    for suffix, ending in (("", ""), ("_instruct", "-Instruct"))
}
"""Short names of `checkpoint.backbone` and the hub ids they stand for."""


def other_base(config: CheckpointConfig, files: CheckpointFiles) -> tuple[str, str] | None:
    """The base that an adapter says it was trained on, and the one it is put on, where these have different names.

    Shapes cannot tell two models of one architecture apart.

    Args:
        config: the `checkpoint` section.
        files: the checkpoint's parts, from `locate_checkpoint`.

    Returns:
        Recorded and given name; None where they are the same, as far as names tell.
    """
    if files.kind != "lora" or not config.backbone:
        return None
    recorded = read_adapter_config(files.model_dir).get("base_model_name_or_path")
    given, _ = resolve_base(config, files.model_dir, {})
    if not isinstance(recorded, str) or not recorded or _same_base(recorded, given, files.model_dir):
        return None
    return recorded, given


def _same_base(recorded: str, given: str, adapter_dir: Path) -> bool:
    if _last_name(recorded) == _last_name(given):
        return True
    places = (adapter_dir / recorded, Path(recorded))
    return is_folder(Path(given)) and any(
        is_folder(place) and os.path.samefile(place, given) for place in places
    )


def _last_name(name: str) -> str:
    """The model's own name: the last part of a path or hub id, also of a folder in the hub's cache."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else "").lower()


def resolve_base(
    config: CheckpointConfig, adapter_dir: Path, adapter: dict[str, Any]
) -> tuple[str, str | None]:
    """The base model of an adapter.

    Args:
        config: the `checkpoint` section; its `backbone` goes before what the adapter says.
        adapter_dir: folder of the adapter, to which a relative name in it may refer.
        adapter: content of adapter_config.json.

    Returns:
        A local folder or hub id, and the hub revision.

    Raises:
        CheckpointError: neither names a base model, or a path does not exist.
    """
    if config.backbone:
        name = full_name(config.backbone)
        assert name is not None
        if _looks_local(name) and not is_folder(Path(name)):
            raise CheckpointError(f"checkpoint.backbone: expected an existing folder, found no {name}")
        return str(Path(name).expanduser()) if _looks_local(name) else name, config.revision
    name = adapter.get("base_model_name_or_path")
    if name is not None and (not isinstance(name, str) or len(name) > _LONGEST_NAME or "\0" in name):
        raise CheckpointError(
            f"{adapter_dir / ADAPTER_CONFIG}: expected the name of a model in base_model_name_or_path, found "
            f"{name!r:.60}; name the base model in checkpoint.backbone"
        )
    if not name:
        raise CheckpointError(
            f"{adapter_dir / ADAPTER_CONFIG}: expected base_model_name_or_path, found none; name the base "
            "model in checkpoint.backbone"
        )
    for folder in (adapter_dir / name, Path(name)):
        if is_folder(folder):
            return str(folder.resolve()), None
    if _looks_local(name):
        raise CheckpointError(
            f"{adapter_dir / ADAPTER_CONFIG}: expected the base model in {name}, found no such folder; name "
            "the base model in checkpoint.backbone"
        )
    return name, config.revision or adapter.get("revision")


def needs_no_hub(config: CheckpointConfig, source: str) -> bool:
    """Whether everything is in a local folder, so that nothing is to be looked up; its code may be on the hub."""
    return is_folder(Path(source)) and not config.trust_remote_code


def full_name(backbone: str | None) -> str | None:
    """The hub's name for a short one; other names as they are."""
    return BACKBONES.get(backbone, backbone) if backbone else None


def _looks_local(name: str) -> bool:
    return (
        is_folder(Path(name))
        or Path(name).is_absolute()
        or name.startswith((".", "~"))
        or name.count("/") > 1
    )


def is_folder(path: Path) -> bool:
    """Whether there is a folder; also for what cannot be a path."""
    try:
        return path.expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, a user that is not there
        return False


def source_remedy(source: str) -> str:
    """What to do where a model cannot be loaded from a source."""
    if os.path.isdir(source):
        return "the folder must be one that `save_pretrained` wrote"
    return (
        "expected a local folder, a hub id that can be reached or is cached, or one of the short names "
        f"{', '.join(BACKBONES)}; set checkpoint.backbone"
    )
