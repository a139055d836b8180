"""Building the demo policy: tokenizer, pre-training, GRPO, and the files of a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from probe.data.arithmetic import vocabulary_texts
from probe.demo.grpo import DemoStatistics, add_adapter, demo_statistics, train_grpo
from probe.demo.pretraining import new_model, pretrain
from probe.demo.recipe import DemoRecipe
from probe.demo.tokenizer import build_tokenizer
from probe.loading import quiet_libraries
from probe.progress import done_line, progress_display


def build_demo(
    folder: Path, base_path: Path, version: int, seed: int, recipe: DemoRecipe, progress: bool
) -> None:
    """Make the demo policy and save it as `base/`, `checkpoint/` and `demo.json`.

    Args:
        folder: an empty folder.
        base_path: where `folder/base` will stand in the end; the adapter names it as its base model.
        version: written to `demo.json`.
        seed: seed of everything random.
        recipe: sizes and settings.
        progress: show progress bars on stderr.

    Raises:
        OSError: a file cannot be written.
    """
    start = time.perf_counter()
    with quiet_libraries(), _reproducible(seed):
        tokenizer = build_tokenizer(vocabulary_texts())
        base = new_model(recipe, tokenizer)
        with _bar("pre-training", recipe.pretrain_steps, "loss", progress) as report:
            pretrain(base, tokenizer, recipe, seed, report)
        with _writing():
            _save_base(base, tokenizer, folder / "base")
        model = add_adapter(base, recipe)
        before = demo_statistics(model, tokenizer, recipe, seed)
        with _bar("GRPO", recipe.grpo_steps, "reward", progress) as report:
            optimizer = train_grpo(model, tokenizer, recipe, seed, report)
        after = demo_statistics(model, tokenizer, recipe, seed)
        with _writing():
            _save_checkpoint(model, tokenizer, optimizer, folder / "checkpoint", base_path)
    facts = {"version": version, "seed": seed, "seconds": round(time.perf_counter() - start, 1)}
    with _writing():
        _save_facts(folder / "demo.json", facts, recipe, before, after)


@contextmanager
def _writing() -> Iterator[None]:
    """Raise what goes wrong while files are written as `OSError`: each library has an error of its own for it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU and compute with one thread; put everything back at the end.

    Sums depend on how they are split over threads, and the model is too small to gain from a second one.
    """
    threads = torch.get_num_threads()
    with isolate_rng(include_cuda=False), torch.enable_grad(), torch.inference_mode(False):
        torch.set_num_threads(1)
        try:
            # Not torch.manual_seed: it would reseed accelerators as well.
            torch.default_generator.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _bar(title: str, steps: int, value_name: str, progress: bool) -> Iterator[Callable[[float], None]]:
    """Progress on stderr, as a function that is called with a value after each step; a line stays in the end."""
    done, last, shown, start = 0, "", progress_display(), time.perf_counter()

    def report(value: float) -> None:
        nonlocal done, last
        done, last = done + 1, f"{value_name} {value:.2f}"
        if progress:
            shown.show(f"demo: {title}", done, steps, last)

    try:
        yield report
    finally:
        shown.close()
    if progress:
        shown.line(done_line(title, time.perf_counter() - start, f"demo policy: {done} steps, {last}"))


def _save_base(base: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the base model and its tokenizer."""
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_checkpoint(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    base_path: Path,
) -> None:
    """Save adapter, tokenizer and optimizer state as a training script would."""
    model.peft_config["default"].base_model_name_or_path = str(base_path)
    # "auto" would look the base model up on the hub to see whether its vocabulary has changed.
    model.save_pretrained(str(folder / "model"), save_embedding_layers=False)
    tokenizer.save_pretrained(folder / "model")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def _save_facts(
    file: Path, facts: dict[str, float], recipe: DemoRecipe, before: DemoStatistics, after: DemoStatistics
) -> None:
    """Save what describes the demo."""
    content = {**facts, "recipe": asdict(recipe), "before_grpo": asdict(before), "after_grpo": asdict(after)}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
