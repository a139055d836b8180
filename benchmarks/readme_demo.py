"""Puts the report of `entropy-probe demo`, as this machine gives it, into README.md.

python benchmarks/readme_demo.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(?<=^```\n)Entropy probe of demo: .*?(?=^```$)", re.DOTALL | re.MULTILINE)
"""The report in README: from its first line to the end of the first table."""


def shown(output: str) -> str:
    r"""The part of the demo's output that README shows.

    >>> shown("Entropy probe of demo: ...\n\nVerdict: ...\n\nEstimators  ...\n")
    'Entropy probe of demo: ...\n\nVerdict: ...\n'
    """
    start = output.index("Entropy probe of demo: ")
    return output[start : output.index("\nEstimators", start)]


def layout(report: str) -> list[str]:
    r"""The labels and explanations of a report, without its numbers and the verdict's reasons.

    >>> layout("Verdict: caution\n  - One 2.\n  H before   0.43066   6.9170   entropy\n")
    ['H before | entropy']
    """
    table = report[report.index("\n", report.index("Verdict")) :]
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if line.strip()]
    kept = [[cell for cell in row if not re.search(r"\d|not resolved", cell)] for row in rows]
    return [" | ".join(row) for row in kept if row and not row[0].startswith("- ")]


def main() -> None:
    """Run the demo in an empty folder and replace the block."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "probe", "demo"]
        env = {**os.environ, "COLUMNS": "80"}
        done = subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True)
    text, found = BLOCK.subn(lambda match: shown(done.stdout), README.read_text(encoding="utf-8"))
    if found != 1:
        raise SystemExit(f"{README}: expected one report of the demo, found {found}")
    README.write_text(text, encoding="utf-8")
    print(f"{README}: the report of the demo is this machine's")


if __name__ == "__main__":
    main()
