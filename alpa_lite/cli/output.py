"""What commands print: results on stdout; progress, remarks and errors on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from alpa_lite.cli.exits import InputError
from alpa_lite.passes.plan_text import printable

Report = Callable[[str, float], None]
"""Called with what is being done and the fraction done."""

# Width of tables in files and pipes, where Rich would assume 80 columns and wrap.
_PIPE_WIDTH = 160


def stdout_console() -> Console:
    """Where results go."""
    return _console(stderr=False)


def stderr_console() -> Console:
    """Where everything else goes."""
    return _console(stderr=True)


def print_json(data: Any) -> None:
    """Data as JSON on stdout; NaN and infinities, which JSON lacks, as null."""
    print(json.dumps(_finite(data), indent=1, allow_nan=False))


def remark(text: str) -> None:
    """A line on stderr."""
    print(printable(text), file=sys.stderr)


def check_folder(path: Path, option: str) -> None:
    """Refuse, before the work is done, to write where there is no folder.

    Raises:
      InputError: the folder of `path` does not exist.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.absolute().parent}")


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Report]:
    """A function that draws a progress bar while the block runs; it does nothing in a pipe.

    Args:
      console: where to draw; stderr by default. Other lines that are printed meanwhile must go
        through the same console.
    """
    console = console or stderr_console()
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def make_table(
    title: str,
    header: Sequence[str] | None,
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
) -> Table:
    """A Rich table of plain cells; `right` names right-aligned columns."""
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=header is not None
    )
    for i, name in enumerate(header or rows[0]):
        table.add_column(Text(name), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else _PIPE_WIDTH
    )
