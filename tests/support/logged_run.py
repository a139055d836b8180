"""A run on a tiny checkpoint with everything in it, and what it has left on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probe import OfflineEntropyProbe, load_log
from tests.support.runs import changed, number_prompts, small_config
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
    page = folder / "pages" / "run.html"
    config = changed(
        small_config(checkpoint, number_prompts(folder)),
        attribution={"enabled": True, "blocks": 4, "states": 6, "responses": 3, "top": 4},
        whatif={"enabled": True, "exact": ["positive_advantage"]},
        detailed_logging={"enabled": True, "level": "debug", "output_directory": str(folder / "logs")},
        output={"report_path": str(page)},
    )
    return Logged(folder, OfflineEntropyProbe(config).run_mixed_probe(), page)
