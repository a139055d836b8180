"""A run on a tiny checkpoint with everything in it, and what it has left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from probe import OfflineEntropyProbe, load_log
from tests.support.tiny_models import lora_checkpoint, save_base


class Logged:
    """What a run has left.

    Attributes:
        folder: with all of it.
        results: the mapping that it returned.
        page: the page that it wrote.
        log: its main log.
        config: its configuration, as it was logged.
    """

    def __init__(self, folder: Path, results: dict[str, Any], page: Path) -> None:
        self.folder, self.results, self.page = folder, results, page
        (self.log,) = folder.glob("logs/*/*.json.gz")
        self.config = self.log.with_name(self.log.name.replace(".json.gz", "_config.yaml"))

    @property
    def document(self) -> dict[str, Any]:
        return load_log(self.log)


def logged_run(folder: Path) -> Logged:
    """A run with attribution, coupling, league table and interventions, whose files are in `folder`."""
    checkpoint, _, _ = lora_checkpoint(folder / "step_60", save_base(folder / "tiny"))
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"{i} apples", "answer": str(i)}) + "\n" for i in range(40))
    )
    page = folder / "pages" / "run.html"
    probe = OfflineEntropyProbe(
        {
            "checkpoint": {"checkpoint_path": str(checkpoint)},
            "batch_config": {
                "dataset_name": str(prompts),
                "split": "train",
                "reward": "tests.support.runs:digits",
                "B_E": 24,
                "B_U": 4,
                "G": 4,
            },
            "generation": {"max_new_tokens": 8, "batch_size": 64},
            "attribution": {"enabled": True, "blocks": 4, "states": 6, "responses": 3, "top": 4},
            "whatif": {"enabled": True, "exact": ["positive_advantage"]},
            "detailed_logging": {"level": "debug", "output_directory": str(folder / "logs")},
            "output": {"report_path": str(page)},
            "trainer": {"accelerator": "cpu", "logger": False},
        }
    )
    return Logged(folder, probe.run_mixed_probe(), page)
