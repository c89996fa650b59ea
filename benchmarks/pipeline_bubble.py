"""Bubbles on the clock against bubbles on paper.

Virtual CPU devices cannot show a bubble. They share the cores, and XLA's CPU client runs programs
of one device inside of the call and those of several devices one after the other, whichever devices
they are for (jax 0.10.2 and 0.12, seen with programs that sleep). So the devices are emulated where
the runtime meets them: its calls enqueue on a thread per mesh, as they enqueue on the stream of an
accelerator, and its slots hold futures. A thread runs what it was given in order: it waits for the
inputs, runs the compiled program, and sleeps until the time that the task shall take is over. A
move is started by the source's thread, and awaited by one for each pair of meshes. Everything else
is the runtime as it is: the same instructions, the same loop; the loss is compared with that of a
plain run.

What is measured is the clock time of every task, and from these the share of mesh-time without
one, from the first task to the last. What it is compared with is the simulator's answer for the
times that the tasks were told to take.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import jax

import alpa_lite
from alpa_lite.passes.schedules import (
    BACKWARD_INPUT,
    FORWARD,
    Task,
    TaskTimes,
    simulate,
)
from alpa_lite.runtime.instructions import RUN, Instruction
from alpa_lite.runtime.pipeline import PipelineExecutable
from benchmarks.pipeline_model import Model
from benchmarks.results_table import Column

NUM_MESHES = 4
NUM_MICROBATCHES = 8
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "zb-h1": 1}  # to stages per mesh
FORWARD_S = 0.1  # of all stages of a mesh together; a backward takes twice as long
TRANSFER_S = 0.005
UNEVEN = (1.0, 1.4, 0.8, 1.2)  # of the stages of each mesh, against the mean
STEPS = 5


def measure_schedule(schedule: str) -> list[dict[str, Any]]:
    """A row with equal and one with uneven stages."""
    num_virtual = SCHEDULES[schedule]
    model = Model(
        num_stages=NUM_MESHES * num_virtual, leaves_per_stage=4, num_microbatches=NUM_MICROBATCHES
    )
    parallel = alpa_lite.parallelize(model.step, method=model.method(2, schedule, num_virtual))
    executable = parallel.compile(model.init(), model.batch())
    rows = []
    for name, shares in (("equal", (1.0,) * NUM_MESHES), ("uneven", UNEVEN)):
        row = measure(executable, model, task_times(executable, shares), STEPS)
        rows.append({"schedule": schedule, "stages": name, **row})
    return rows


def task_times(executable: PipelineExecutable, shares: Sequence[float]) -> TaskTimes:
    """The seconds that tasks and transfers shall take.

    Args:
      executable: for its schedule.
      shares: per mesh, how long its tasks take against the mean.
    """
    homes = executable.pipeline.schedule.placements[0]
    each_s = [FORWARD_S * shares[m] / homes.count(m) for m in homes]
    links = [TRANSFER_S * (a != b) for a, b in itertools.pairwise(homes)]
    tasks = [i.task for i in executable.program.instructions if i.task is not None]
    # Nobody waits for the first stage: all of its backward pass is in the weight part.
    split = {t.stage for t in tasks if t.kind == BACKWARD_INPUT}
    return TaskTimes(
        forward_s=tuple(each_s),
        backward_s=tuple(2 * s for s in each_s),
        backward_input_s=tuple(s * (i in split) for i, s in enumerate(each_s)),
        backward_weight_s=tuple(s * (1 if i in split else 2) for i, s in enumerate(each_s)),
        forward_transfer_s=tuple(links),
        backward_transfer_s=tuple(links),
    )


def measure(
    executable: PipelineExecutable, model: Model, times: TaskTimes, steps: int
) -> dict[str, Any]:
    """Bubble and makespan, measured and simulated."""
    schedule = executable.pipeline.schedule
    timeline = simulate(schedule, times)
    batch = model.batch()
    state, loss = executable(model.init(), batch)
    state = model.init()
    bubbles, makespans = [], []
    for step in range(steps + 1):  # the first one warms up
        with Emulation(executable, times) as emulated:
            state, found = emulated.run(jax.tree.leaves((state, batch)))
        if step == 0 and float(found) != float(loss):
            raise AssertionError(f"the loss is {found} on emulated devices, {loss} without")
        if step:
            spans = [(r.start_s, r.end_s) for r in emulated.records]
            makespan_s = max(b for _, b in spans) - min(a for a, _ in spans)
            busy_s = sum(b - a for a, b in spans)
            bubbles.append(1 - busy_s / (schedule.num_meshes * makespan_s))
            makespans.append(makespan_s)
    return {
        "simulated": timeline.bubble_share,
        "measured": statistics.median(bubbles),
        "difference": statistics.median(bubbles) - timeline.bubble_share,
        "simulated_ms": 1e3 * timeline.makespan_s,
        "measured_ms": 1e3 * statistics.median(makespans),
    }


@dataclass(frozen=True, slots=True)
class Record:
    """When a task ran, in seconds of the monotonic clock."""

    task: Task
    mesh: int
    start_s: float
    end_s: float


@dataclass(slots=True, eq=False)
class Emulation:
    """An executable on emulated devices; a context, at whose end the threads end.

    Attributes:
      executable: what to run.
      times: how long tasks and transfers take.
      records: of the tasks that ran.
    """

    executable: PipelineExecutable
    times: TaskTimes
    records: list[Record] = field(default_factory=list)
    _streams: dict[tuple[int, int], _Stream] = field(default_factory=dict)

    def __enter__(self) -> Emulation:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._streams.values():
            stream.close()

    def run(self, leaves: Sequence[Any]) -> Any:
        """One step, awaited."""
        program = self.executable.program
        latest: dict[int, Task | None] = {}
        wrapped = []
        for each in program.instructions:
            if each.kind == RUN:
                latest[each.mesh] = each.task
                wrapped.append(replace(each, call=self._program(each)))
            else:
                task = latest.get(each.mesh)
                wrapped.append(replace(each, call=self._move(each, task)))
        emulated = replace(self.executable, program=replace(program, instructions=tuple(wrapped)))
        return jax.tree.map(lambda x: x.result(), emulated.run(leaves))

    def _stream(self, mesh: int, target: int) -> _Stream:
        return self._streams.setdefault((mesh, target), _Stream())

    def _program(self, each: Instruction) -> Callable[..., tuple[Future[Any], ...]]:
        stream, task = self._stream(each.mesh, each.mesh), each.task
        seconds = 0.0 if task is None else self.times.of_kind(task.kind)[task.stage]

        def call(*args: Any) -> tuple[Future[Any], ...]:
            futures = tuple(Future[Any]() for _ in each.writes)

            def work() -> None:
                values = [_value(x) for x in args]
                begun = time.perf_counter()
                results = jax.block_until_ready(each.call(*values))
                _sleep_until(begun + seconds)
                if task is not None:
                    self.records.append(Record(task, each.mesh, begun, time.perf_counter()))
                for future, x in zip(futures, results, strict=True):
                    future.set_result(x)

            stream.put(work, futures)
            return futures

        return call

    def _move(self, each: Instruction, task: Task | None) -> Callable[[Any], Future[Any]]:
        source, link = self._stream(each.mesh, each.mesh), self._stream(each.mesh, each.target)
        seconds = 0.0
        if task is not None and each.target != each.mesh:
            seconds = (
                self.times.forward_transfer_s[task.stage]
                if task.kind == FORWARD
                else self.times.backward_transfer_s[task.stage - 1]
            )

        def call(x: Any) -> Future[Any]:
            future: Future[Any] = Future()

            def start() -> None:
                moved = each.call(_value(x))

                def finish() -> None:
                    begun = time.perf_counter()
                    jax.block_until_ready(moved)
                    _sleep_until(begun + seconds)
                    future.set_result(moved)

                link.put(finish, (future,))

            source.put(start, (future,))
            return future

        return call


class _Stream:
    """A thread that does what it is given, in order."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None], futures: Sequence[Future[Any]]) -> None:
        """Enqueue work; the futures get its error, if there is one."""
        self._queue.put((work, futures))

    def close(self) -> None:
        """Wait for all of it."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        for work, futures in iter(self._queue.get, None):
            try:
                work()
            except Exception as error:  # noqa: BLE001  (handed on)
                for future in futures:
                    future.set_exception(error)


def _value(x: Any) -> Any:
    return x.result() if isinstance(x, Future) else x


def _sleep_until(moment_s: float) -> None:
    left_s = moment_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)


TITLE = (
    f"Idle share of {NUM_MESHES} meshes from the first task to the last, {NUM_MICROBATCHES} "
    f"microbatches, on emulated devices; forward {1e3 * FORWARD_S:g} ms per mesh and microbatch, "
    f"backward {2e3 * FORWARD_S:g} ms, transfers {1e3 * TRANSFER_S:g} ms; medians of {STEPS} steps"
)
COLUMNS = (
    Column("schedule", "Schedule"),
    Column("stages", "Stages"),
    Column("simulated", "Simulated bubble", ".1%"),
    Column("measured", "Measured bubble", ".1%"),
    Column("difference", "Difference", "+.1%"),
    Column("simulated_ms", "Simulated ms", ".0f"),
    Column("measured_ms", "Measured ms", ".0f"),
)
