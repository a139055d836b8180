"""Where the demo policy is kept: made once, whole or not at all, and made again where a part is missing."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from probe.demo.build import build_demo
from probe.demo.recipe import DemoRecipe
from probe.errors.exceptions import CheckpointError, LogError
from probe.files.atomic import ensure_writable, remove_leftovers, temporary_name

DEMO_VERSION = 1
"""Raised with every change that makes other weights, so that no older cache is taken for the new demo."""

DEMO_FILES = (
    "base/config.json",
    "base/model.safetensors",
    "base/tokenizer.json",
    "base/tokenizer_config.json",
    "checkpoint/model/adapter_config.json",
    "checkpoint/model/adapter_model.safetensors",
    "checkpoint/model/tokenizer.json",
    "checkpoint/model/tokenizer_config.json",
    "checkpoint/optimizer.pt",
    "demo.json",
)


def ensure_demo_checkpoint(
    cache_dir: Path | None = None, seed: int = 0, progress: bool = True, recipe: DemoRecipe | None = None
) -> Path:
    """The demo checkpoint: a LoRA adapter on a small Qwen2 model, with its optimizer state, in the middle of GRPO.

    It is made when it is absent or damaged (about half a minute on one CPU core) and reused otherwise. The same seed
    gives the same bytes of weights and optimizer state. Global random states and thread settings are left as they
    were.

    Args:
        cache_dir: folder in which the demo gets a folder of its own; by default `$ENTROPY_PROBE_CACHE`, else
            `$XDG_CACHE_HOME/entropy-probe`, else `~/.cache/entropy-probe`.
        seed: seed of everything random in it, from 0 to 2**32 - 1.
        progress: show progress bars on stderr.
        recipe: sizes and settings other than the usual ones; a `cache_dir` holds one recipe only.

    Returns:
        The checkpoint folder, with `model/` and `optimizer.pt`; its base model stands in `../base`.

    Raises:
        ValueError: an impossible seed.
        CheckpointError: the cache folder cannot be written.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an integer from 0 to 2**32 - 1, found {seed}")
    root = _root(cache_dir, seed)
    if not is_complete(root):
        try:
            _make(root, seed, recipe or DemoRecipe(), progress)
        except (OSError, LogError) as error:
            raise CheckpointError(
                f"demo: expected a cache folder that can be written, found {root.parent} "
                f"({error}); set "
                "ENTROPY_PROBE_CACHE to a folder that you may write to, on a disk with some megabytes of space"
            ) from error
    return root / "checkpoint"


def demo_is_cached(cache_dir: Path | None = None, seed: int = 0) -> bool:
    """Whether `ensure_demo_checkpoint` would reuse what is there."""
    return is_complete(_root(cache_dir, seed))


def _root(cache_dir: Path | None, seed: int) -> Path:
    """The folder of a demo."""
    return Path(os.path.abspath(cache_dir or default_cache_dir())) / f"demo-v{DEMO_VERSION}-seed{seed}"


def is_complete(root: Path) -> bool:
    """Whether `root` holds every file of a demo, and its adapter points to the base model in it."""
    if not all((root / name).is_file() for name in DEMO_FILES):
        return False
    try:
        adapter = json.loads((root / "checkpoint/model/adapter_config.json").read_text(encoding="utf-8"))
        version = json.loads((root / "demo.json").read_text(encoding="utf-8"))["version"]
    except (ValueError, KeyError, TypeError):
        return False
    # A folder that was moved as a whole has an adapter whose base model is no longer there.
    return version == DEMO_VERSION and adapter.get("base_model_name_or_path") == str(root / "base")


def default_cache_dir() -> Path:
    """The cache folder of the environment; empty variables count as unset, as the XDG specification has it."""
    if own := os.environ.get("ENTROPY_PROBE_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "entropy-probe"
    return Path("~/.cache/entropy-probe").expanduser()


def _make(root: Path, seed: int, recipe: DemoRecipe, progress: bool) -> None:
    """Build the demo in a folder beside `root` and move it there in one step."""
    root.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root.parent, f".{root.name}")
    temporary = root.with_name(temporary_name(f".{root.name}"))
    try:
        ensure_writable(temporary)
        build_demo(temporary, root / "base", DEMO_VERSION, seed, recipe, progress)
        _move(temporary, root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(built: Path, root: Path) -> None:
    """Rename `built` to `root`, unless another process has put a whole demo there meanwhile."""
    while not is_complete(root):
        try:
            built.rename(root)
            return
        except OSError:
            if not root.exists():
                raise
        # A damaged demo is in the way. Another process may be removing it as well, and be faster.
        damaged = built.with_name(temporary_name(f".{root.name}"))
        with suppress(FileNotFoundError):
            root.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
