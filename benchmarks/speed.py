"""All measurements of speed and memory, one after the other, into `RESULTS.md`: `make bench`.

Each is a benchmark of its own with few rounds, in some ten minutes together on two cores; every ratio is against a
named alternative in the same run. What the tables say of other kinds (agreement, coverage, forecasts) takes hours and
is not repeated here.

    python benchmarks/speed.py [--only NAME ...] [--print]
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"


@dataclass(frozen=True)
class Measurement:
    """A benchmark as it is run here.

    Attributes:
        title: of its section.
        command: file and options.
        what: what the numbers are.
    """

    title: str
    command: tuple[str, ...]
    what: str


MEASUREMENTS = {
    "demo": Measurement(
        "A whole probe of the demo policy, forward mode",
        ("whole_probe.py", "--rounds", "3"),
        "Units of one plain forward and backward over E and U, everything that is on by default included.",
    ),
    "differences": Measurement(
        "The same by central differences",
        ("whole_probe.py", "--rounds", "3", "--derivative_mode", "finite_difference"),
        "Units as above.",
    ),
    "large": Measurement(
        "A whole probe with hidden 896, 6 layers and a vocabulary of 151,936, forward mode",
        ("whole_probe.py", "--policy", "large", "--B_E", "64", "--rounds", "1"),
        "Units as above. Of so small an E the parts that checks and error bars take are a large share.",
    ),
    "head": Measurement(
        "The output head beside those of others",
        ("head.py", "--rounds", "1", "--tokens", "128"),
        "Each cell: processor seconds over those of the bare products, and peak memory in MB.",
    ),
    "long": Measurement(
        "Long responses",
        ("long_responses.py", "--rounds", "1", "--lengths", "256", "1024", "4096"),
        "Attention in blocks of queries and all at once.",
    ),
    "padding": Measurement(
        "Padding", ("padding.py",), "By the way in which responses are cut into microbatches."
    ),
    "prompts": Measurement(
        "Prompts through the model once for all of their responses",
        ("shared_prompts.py", "--rounds", "1", "--prompts", "4"),
        "Against once for each response; `positions` is the share of these that goes through the model.",
    ),
    "sampling": Measurement(
        "Sampling",
        ("sampling.py", "--rounds", "1", "--B", "64", "--batch_size", "32"),
        "A batch kept to its last row, what goes on of several batches taken together, and transformers' continuous "
        "batching.",
    ),
    "memory": Measurement(
        "Memory of a whole probe by the size of E",
        ("memory.py", "--sizes", "64", "512", "2048"),
        "Sampling included.",
    ),
}


def hardware() -> str:
    """Processor, cores, memory and versions, in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB; Python {platform.python_version()}, "
        f"torch {torch.__version__} ({capability})"
    )


def run(one: Measurement) -> str:
    """The section of a benchmark: what it printed from its first table or sentence on.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    file, *options = one.command
    command = [sys.executable, str(ROOT / "benchmarks" / file), *options]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    seconds = time.perf_counter() - start
    table = done.stdout.strip()
    print(f"{one.title}: {seconds:.0f} s", file=sys.stderr)
    return f"### {one.title}: `{' '.join(one.command)}`\n\n{one.what}\n\n{table}\n"


def write(section: str) -> None:
    """Put the section in its place in `RESULTS.md`, instead of what an earlier run had put there.

    Raises:
        ValueError: the place is not marked.
    """
    text = RESULTS.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{RESULTS}: expected one line {BEGIN!r} and after it one {END!r}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    unfinished = RESULTS.with_suffix(".md.new")
    unfinished.write_text(f"{before}{BEGIN}\n{section}{END}{after}")
    unfinished.replace(RESULTS)


def main() -> int:
    """Run all, and write or print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS)
    )
    parser.add_argument("--print", action="store_true", help="print them instead of writing RESULTS.md")
    options = parser.parse_args()
    start = time.perf_counter()
    parts = [run(one) for name, one in MEASUREMENTS.items() if name in (options.only or MEASUREMENTS)]
    minutes = (time.perf_counter() - start) / 60
    head = f"{date.today().isoformat()}, {hardware()}; {minutes:.1f} minutes.\n"
    section = "\n".join([head, *parts])
    if options.print or options.only:
        print(section)
    else:
        write(section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
