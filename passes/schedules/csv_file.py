"""Schedules as CSV text: one row per mesh, one cell per task.

    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1

A cell is stage, kind, microbatch: F forward, B backward, I backward_input, W backward_weight. Empty
cells are skipped, so a grid with a column per time step is read as well; so are empty lines at the
end. This is what PyTorch's pipelining and torchtitan call the compute-only format; their cell
`(0F1;1B0)OVERLAP_F_B` is read as two tasks. Which mesh holds which stage, and how many pipelines
there are, follows from the cells.
"""

from __future__ import annotations

import csv
import io
import re

from .errors import ScheduleError
from .task import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Schedule, Task
from .verify import verify_schedule

# Ten times the text of the largest schedule one would plan: 2,048 microbatches through 256 stages.
MAX_CHARACTERS = 1 << 27

_LETTERS = {FORWARD: "F", BACKWARD: "B", BACKWARD_INPUT: "I", BACKWARD_WEIGHT: "W"}
_KINDS = {letter: kind for kind, letter in _LETTERS.items()}
_CELL = re.compile(r"([0-9]{1,6})([FBIW])([0-9]{1,6})")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


def schedule_to_csv(schedule: Schedule) -> str:
    """One row per mesh, in the order of its tasks; the name is not in it."""
    return "".join(
        ",".join(f"{task.stage}{_LETTERS[task.kind]}{task.microbatch}" for task in tasks) + "\n"
        for tasks in schedule.tasks
    )


def schedule_from_csv(text: str, *, name: str = "custom") -> Schedule:
    """Read a schedule, and check it.

    Args:
      text: not trusted.
      name: what to call it. With a name in `SCHEDULES` it has to be that schedule.

    Raises:
      ScheduleError: the text is not such a table, with line and column; or the schedule does not
        pass `verify_schedule`.
    """
    if len(text) > MAX_CHARACTERS:
        raise ScheduleError(
            f"a schedule file may have {MAX_CHARACTERS} characters, found {len(text)}"
        )
    rows = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            tasks = [task for i, cell in enumerate(row) for task in _read(cell, reader.line_num, i)]
            rows.append(tuple(tasks))
    except csv.Error as error:
        raise ScheduleError(f"line {reader.line_num}: not CSV: {error}") from None
    while rows and not rows[-1]:
        rows.pop()
    placements, pipeline_of = _placements(rows)
    schedule = Schedule(name, placements, pipeline_of, tuple(rows))
    verify_schedule(schedule)
    return schedule


def _read(cell: str, line: int, column: int) -> list[Task]:
    """Tasks of one cell.

    Raises:
      ScheduleError: it is not one.
    """
    cell = cell.strip()
    pair = _PAIR.fullmatch(cell)
    tasks = []
    for part in pair.groups() if pair else [cell] if cell else []:
        match = _CELL.fullmatch(part.strip())
        if match is None:
            shown = cell if len(cell) <= 40 else cell[:40] + "..."
            raise ScheduleError(
                f"line {line}, cell {column + 1}: a cell is stage, one of the letters F B I W, and "
                f"microbatch, such as 3F0, with numbers up to 999999; found {shown!r}",
                mesh=line - 1,
                position=column,
            )
        tasks.append(Task(_KINDS[match[2]], int(match[1]), int(match[3])))
    return tasks


def _placements(
    rows: list[tuple[Task, ...]],
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Pipelines and who takes which: a stage is where its forward is.

    Raises:
      ScheduleError: there is no forward of some stage and microbatch.
    """
    mesh_of = {
        (task.stage, task.microbatch): mesh
        for mesh, tasks in enumerate(rows)
        for task in tasks
        if task.kind == FORWARD
    }
    stages = 1 + max((stage for stage, _ in mesh_of), default=0)
    microbatches = 1 + max((microbatch for _, microbatch in mesh_of), default=0)
    if len(mesh_of) < stages * microbatches:
        # Found after as many steps as there are cells, whatever the numbers in them.
        missing = next(
            (stage, microbatch)
            for stage in range(stages)
            for microbatch in range(microbatches)
            if (stage, microbatch) not in mesh_of
        )
        raise ScheduleError(
            f"with {stages} stages and {microbatches} microbatches there must be "
            f"{stages * microbatches} forwards, found {len(mesh_of)}; the first that is missing is "
            f"{missing[0]}F{missing[1]}"
        )
    pipelines: dict[tuple[int, ...], int] = {}
    pipeline_of = tuple(
        pipelines.setdefault(
            tuple(mesh_of[stage, microbatch] for stage in range(stages)), len(pipelines)
        )
        for microbatch in range(microbatches)
    )
    return tuple(pipelines), pipeline_of
