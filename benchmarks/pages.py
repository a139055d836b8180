"""Takes the pictures of the pages that README and docs show: a run of the demo policy, and a training that collapses.

    python benchmarks/pages.py

Without `--log` the demo is probed with attribution and interventions (a minute); without `--training` the run of
`benchmarks/collapse.py` that collapses is trained (several minutes). With `--tensorboard FOLDER` there is one of
TensorBoard's first page as well; `benchmarks/collapse.py --folder FOLDER --report_to tensorboard` writes such a folder.
The tests of pages drive the same browser.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.collapse import COLLAPSING, FRACTION, attach_probe, make_trainer
from probe import OfflineEntropyProbe, load_log
from probe.cli.old_logs import page_of
from probe.config.files import read_config_file
from tests.support.browser import open_browser

DOCS = Path(__file__).parent.parent / "docs"
WIDTH = 1400
STEPS, EVERY = 130, 2


def run_log(folder: Path) -> Path:
    """The log of a run of the demo policy with everything in it."""
    config = read_config_file("quickstart")
    for section, keys in {
        "attribution": {"enabled": True},
        "whatif": {"enabled": True, "exact": ["positive_advantage"]},
        "detailed_logging": {"level": "debug", "log_raw_tensors": False, "output_directory": str(folder)},
        "trainer": {"logger": False},
    }.items():
        config[section] = {**config.get(section, {}), **keys}
    OfflineEntropyProbe(config).run_mixed_probe()
    (log,) = folder.glob("*/*.json.gz")
    return log


def training_log(folder: Path) -> Path:
    """The state of a trainer whose policy's entropy collapses."""
    trainer = make_trainer(folder, COLLAPSING, STEPS)
    attach_probe(trainer, EVERY, 64, 0, FRACTION)
    trainer.train()
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"log_history": trainer.state.log_history}))
    return path


def pictures(run: Path, training: Path, output: Path) -> list[Path]:
    """Screenshots: the top of a run's page, its tokens, and the top of a training's page in the dark."""
    taken: list[Path] = []

    def take(page: Any, name: str, first: str, last: str) -> None:
        """What stands between the top of one element and the bottom of another."""
        top, bottom = (page.locator(one).first.bounding_box() for one in (first, last))
        clip = {
            "x": 0,
            "y": max(top["y"] - 16, 0),
            "width": WIDTH,
            "height": bottom["y"] + bottom["height"] + 32 - top["y"],
        }
        page.screenshot(path=str(output / name), full_page=True, clip=clip)
        taken.append(output / name)

    with tempfile.TemporaryDirectory() as scratch, open_browser() as browser:
        for kind, source in (("run", run), ("training", training)):
            (Path(scratch) / f"{kind}.html").write_text(page_of(source), encoding="utf-8")

        def visit(kind: str, scheme: str) -> Any:
            page = browser.new_page(viewport={"width": WIDTH, "height": 1000}, color_scheme=scheme)
            page.goto((Path(scratch) / f"{kind}.html").as_uri())
            return page

        page = visit("run", "light")
        take(page, "report.png", "header", "#tokens figure")
        page.locator(".token").nth(2).hover()
        page.evaluate("window.scrollTo(0, 0)")
        take(page, "report_tokens.png", "#responses", ".response:nth-child(4)")
        take(visit("training", "dark"), "report_training.png", "header", "#forecast")
    return taken


def tensorboard_picture(logdir: Path, output: Path) -> Path:
    """A screenshot of TensorBoard's first page of a folder with trainings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", address.rpartition(":")[2]])
    try:
        for _ in range(100):
            with suppress(OSError), urllib.request.urlopen(address):
                break
            time.sleep(0.3)
        with open_browser() as browser:
            page = browser.new_page(viewport={"width": 1368, "height": 912})
            page.goto(f"{address}/#timeseries")
            page.get_by_text("entropy_probe/2_forecast").first.wait_for(timeout=60_000)
            page.wait_for_timeout(4_000)  # pictures are fetched when their cards are there
            page.screenshot(path=str(output / "collapse_tensorboard.png"))
    finally:
        server.terminate()
        server.wait()
    return output / "collapse_tensorboard.png"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, help="log of a run, at the level debug")
    parser.add_argument("--training", type=Path, help="trainer_state.json of a training")
    parser.add_argument("--tensorboard", type=Path, help="folder with the events of trainings")
    parser.add_argument("--output", type=Path, default=DOCS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = args.log or run_log(Path(folder) / "run")
        load_log(run)
        training = args.training or training_log(Path(folder) / "training")
        for path in pictures(run, training, args.output):
            print(path)
    if args.tensorboard is not None:
        print(tensorboard_picture(args.tensorboard, args.output))


if __name__ == "__main__":
    main()
