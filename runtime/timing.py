"""When the instructions of a pipeline run: each alone, or all as they run in a step.

`time_alone` waits before and after every instruction, which gives what each takes by itself.
`record_step` starts them as a step does, without waiting, while a thread for every mesh and every
pair of meshes notes when its results become ready.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import jax

from alpa_lite.passes.schedules import Task
from alpa_lite.runtime.arrays import is_local
from alpa_lite.runtime.instructions import RUN, Instruction
from alpa_lite.runtime.pipeline import PipelineExecutable, execute


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedInstruction:
    """One instruction of one step.

    Attributes:
      name: of the instruction.
      kind: `forward`, `backward`, `backward_input`, `backward_weight`, `prepare`, `update`; `move`,
        or `send` or `receive` if another process has the other end.
      mesh: that runs it; of what is moved, where it comes from.
      target: of what is moved, where it goes; else None.
      task: of the schedule, if it is one.
      start_s, end_s: seconds from the start of the step. Alone: the sum of what ran before, and of
        this. In a step: when its mesh or link was free, its inputs were ready and it had been
        started; and when its results were seen ready.
      dispatch_s: seconds until the call returned.
    """

    name: str
    kind: str
    mesh: int
    target: int | None
    task: Task | None
    start_s: float
    end_s: float
    dispatch_s: float

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, eq=False)
class StepRecording:
    """A step as it ran.

    Attributes:
      instructions: in the order in which they were started.
      memory: per mesh, (seconds, bytes on one device) whenever arrays that the step holds are made
        or dropped, by the start and end of the instruction that does; empty for meshes of which
        this process has no device.
      step_s: seconds until all results were ready.
    """

    instructions: tuple[TimedInstruction, ...]
    memory: tuple[tuple[tuple[float, int], ...], ...]
    step_s: float


def kind_of(instruction: Instruction) -> str:
    """The class of an instruction; see `TimedInstruction.kind`."""
    if instruction.kind != RUN:
        return instruction.kind
    if instruction.task is not None:
        return instruction.task.kind
    return instruction.name.split()[0]


def time_alone(
    executable: PipelineExecutable, leaves: Sequence[Any]
) -> tuple[Any, tuple[TimedInstruction, ...]]:
    """Run one step, waiting before and after every instruction.

    A time includes the latency of one call, which a step that does not wait hides. The results of a
    program become ready together, so the first is waited for. A send is over when it is started, a
    receive when the value is there: that contains waiting for the sender.

    Args:
      executable: the pipeline.
      leaves: of its arguments; the state is donated.

    Returns:
      Its result, and the times.
    """
    slots = executable.enter(leaves)
    jax.block_until_ready(slots)
    found = []
    clock_s = 0.0
    for each in executable.program.instructions:
        jax.block_until_ready([slots[s] for s in each.reads])
        begun = time.perf_counter()
        execute(each, slots)
        returned = time.perf_counter()
        jax.block_until_ready([slots[s] for s in each.writes[:1]])
        taken_s = time.perf_counter() - begun
        found.append(_timed(each, clock_s, clock_s + taken_s, returned - begun))
        clock_s += taken_s
    return executable.leave(slots), tuple(found)


def record_step(executable: PipelineExecutable, leaves: Sequence[Any]) -> tuple[Any, StepRecording]:
    """Run one step, and note when every instruction ended.

    Where all results of an instruction are donated later, a program that reads one element is run
    after it: the first recording of an executable compiles these.

    Args:
      executable: the pipeline.
      leaves: of its arguments; the state is donated.
    """
    instructions = executable.program.instructions
    donated = frozenset(s for each in instructions for s in each.donates)
    watchers: dict[tuple[int, int], _Watcher] = {}
    begun = time.perf_counter()
    slots = executable.enter(leaves)
    arrays = {i: _described(x) for i, x in enumerate(slots) if x is not None}
    initial = set(arrays)
    called, returned = [], []
    try:
        for number, each in enumerate(instructions):
            lane = each.mesh, each.target
            if lane not in watchers:
                watchers[lane] = _Watcher()
            called.append(time.perf_counter() - begun)
            execute(each, slots)
            returned.append(time.perf_counter() - begun)
            arrays.update((s, _described(slots[s])) for s in each.writes)
            watchers[lane].put(number, _witness(each, slots, donated))
        result = executable.leave(slots)
    finally:
        ends = {n: t - begun for w in watchers.values() for n, t in w.close().items()}
    jax.block_until_ready(result)
    step_s = time.perf_counter() - begun
    starts, stops = _fit(instructions, called, returned, ends)
    timed = tuple(
        _timed(each, starts[i], stops[i], returned[i] - called[i])
        for i, each in enumerate(instructions)
    )
    memory = _memory(executable, arrays, initial, starts, stops)
    return result, StepRecording(timed, memory, step_s)


def _described(x: jax.Array) -> tuple[Any, Any, Any]:
    return x.shape, x.dtype, x.sharding


def _timed(each: Instruction, start_s: float, end_s: float, dispatch_s: float) -> TimedInstruction:
    return TimedInstruction(
        name=each.name, kind=kind_of(each), mesh=each.mesh,
        target=None if each.kind == RUN else each.target, task=each.task, start_s=start_s,
        end_s=end_s, dispatch_s=dispatch_s,
    )  # fmt: skip


def _fit(
    instructions: Sequence[Instruction], called: Sequence[float], returned: Sequence[float],
    ends: dict[int, float],
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Start and end of every instruction, none before what it waits for."""
    ready: dict[int, float] = {}
    free: dict[tuple[int, int], float] = {}
    starts, stops = [], []
    for i, each in enumerate(instructions):
        lane = each.mesh, each.target
        start_s = max([called[i], free.get(lane, 0.0), *(ready.get(s, 0.0) for s in each.reads)])
        end_s = max(start_s, ends.get(i, returned[i]))
        free[lane] = end_s
        ready.update(dict.fromkeys(each.writes, end_s))
        starts.append(start_s)
        stops.append(end_s)
    return starts, stops


def _witness(each: Instruction, slots: Sequence[Any], donated: frozenset[int]) -> Any:
    """An array that becomes ready with the instruction's results, and is not donated."""
    kept = next((s for s in each.writes if s not in donated), None)
    if kept is not None or not each.writes:
        return None if kept is None else slots[kept]
    return _first_element(slots[each.writes[0]].addressable_data(0))


@jax.jit
def _first_element(x: jax.Array) -> jax.Array:
    return x.ravel()[:1]


class _Watcher:
    """A thread that notes when arrays become ready, in order."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
        self._times: dict[int, float] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def put(self, number: int, witness: Any) -> None:
        """Note under this number when an array becomes ready."""
        if witness is not None:
            self._queue.put((number, witness))

    def close(self) -> dict[int, float]:
        """Wait for all of them; the times of `time.perf_counter`.

        Raises:
          Exception: the first error of a program.
        """
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._times

    def _watch(self) -> None:
        try:
            for number, witness in iter(self._queue.get, None):
                jax.block_until_ready(witness)
                self._times[number] = time.perf_counter()
        except Exception as error:  # noqa: BLE001  (raised by `close`)
            self._error = error


def _memory(
    executable: PipelineExecutable, arrays: Mapping[int, tuple[Any, Any, Any]], initial: set[int],
    starts: Sequence[float], ends: Sequence[float],
) -> tuple[tuple[tuple[float, int], ...], ...]:  # fmt: skip
    """See `StepRecording.memory`.

    Args:
      executable: what ran.
      arrays: (shape, dtype, sharding) by slot.
      initial: slots that are filled before the first instruction.
      starts: seconds, per instruction.
      ends: seconds, per instruction.
    """
    mesh_of = {
        device: stage.mesh
        for stage, mesh in zip(executable.plan.stages, executable.meshes, strict=True)
        for device in mesh.devices.flat
    }
    here = {s: x for s, x in arrays.items() if is_local(x[2])}
    size = {s: bytes_per_device(*described) for s, described in here.items()}
    home = {s: mesh_of[next(iter(x[2].device_set))] for s, x in here.items()}
    changes: list[dict[float, int]] = [defaultdict(int) for _ in executable.plan.meshes]
    for slot in initial & here.keys():
        changes[home[slot]][0.0] += size[slot]
    for each, start_s, end_s in zip(executable.program.instructions, starts, ends, strict=True):
        for slot in each.writes:
            changes[home[slot]][start_s] += size[slot]
        for slot in each.frees:
            changes[home[slot]][start_s if slot in each.donates else end_s] -= size[slot]
    return tuple(
        tuple(zip(sorted(c), itertools.accumulate(c[t] for t in sorted(c)), strict=True))
        for c in changes
    )


def bytes_per_device(shape: Sequence[int], dtype: Any, sharding: jax.sharding.Sharding) -> int:
    """Bytes of an array on each of its devices."""
    return math.prod(sharding.shard_shape(tuple(shape))) * dtype.itemsize
