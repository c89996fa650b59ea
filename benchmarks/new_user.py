"""How long a new user waits: clone, `make demo`, first plan of a model of one's own, first report.

    python -m benchmarks.new_user [--folder FOLDER]

Everything is done as the quickstart says, in a fresh clone with an environment of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results_table import Column, ResultsTable, describe_environment

ROOT = Path(__file__).parent.parent


def example(page: Path) -> str:
    """The file `mine.py` of the quickstart: its first Python block."""
    found = re.search(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"{page} has no Python block")
    return found[1]


def steps(clone: Path) -> list[tuple[str, str, Sequence[str]]]:
    """(what, shown command, command) in the order of the quickstart."""
    program = str(clone / ".venv" / "bin" / "alpa-lite")
    plan = ["plan", "mine:factory", "--cluster", "h100:8", "-o", "plan.json"]
    report = ["report", "plan.json", "-o", "report.html"]
    explained = [*report, "--explain", "--target", "mine:factory"]
    return [
        ("clone", "git clone", ["git", "clone", "-q", str(ROOT), str(clone)]),
        ("demo, environment included", "make demo", ["make", "demo", f"PYTHON={sys.executable}"]),
        ("first plan of one's own step", "alpa-lite plan mine:factory", [program, *plan]),
        ("first report", "alpa-lite report", [program, *report]),
        ("the same, explained", "alpa-lite report --explain", [program, *explained]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="new-user-"))
    clone = folder / "alpa-lite"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    rows = []
    for what, shown, command in steps(clone):
        where = clone if clone.exists() else folder
        begun = time.perf_counter()
        subprocess.run(command, cwd=where, env=environment, check=True, stdout=subprocess.DEVNULL)
        rows.append({"what": what, "command": shown, "seconds": time.perf_counter() - begun})
        print(f"{what}: {rows[-1]['seconds']:.1f} s", flush=True)
        if what == "clone":
            (clone / "mine.py").write_text(example(clone / "docs" / "quickstart.md"))
    ResultsTable(
        title="A new user's first steps, by the clock, downloads included",
        command="python -m benchmarks.new_user",
        environment=describe_environment("no accelerator, other programs beside it"),
        columns=(
            Column("what", "Step"),
            Column("command", "Command"),
            Column("seconds", "Seconds", ".1f"),
        ),
        rows=tuple(rows),
    ).save("new_user")


if __name__ == "__main__":
    main()
