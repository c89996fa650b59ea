"""What a pipeline does with its time, measured: `profile_step`, `StepMetrics`."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from alpa_lite.cost_model import Cluster
from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.plan_text import Row, section
from alpa_lite.passes.schedules import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Schedule,
    Task,
    TaskTimes,
    Timeline,
    simulate,
)
from alpa_lite.passes.stages.model_flops import model_flops
from alpa_lite.passes.stages.source import LayeredStep
from alpa_lite.passes.units import format_seconds
from alpa_lite.runtime.group import process_group
from alpa_lite.runtime.instructions import MOVE, RECEIVE, SEND
from alpa_lite.runtime.pipeline import PipelineExecutable
from alpa_lite.runtime.timing import (
    StepRecording,
    TimedInstruction,
    record_step,
    time_alone,
)

MOVES = (MOVE, SEND, RECEIVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionTimes:
    """The instructions of one class on one mesh.

    Attributes:
      kind: see `TimedInstruction`.
      mesh: where; of what is moved, where it comes from.
      count: how many in a step.
      total_s: seconds per step, each run alone.
      median_s: seconds of one.
    """

    kind: str
    mesh: int
    count: int
    total_s: float
    median_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepMetrics:
    """What one step of a pipeline does with its time.

    Attributes:
      plan: what was run.
      step_s: seconds of a step, started and awaited; median of the steps that were timed.
      dispatch_s: of it, host seconds until the step's call returned; median.
      num_instructions: calls per step.
      instructions: seconds by class and mesh, each instruction run alone.
      times: the same as the simulator takes them, medians over microbatches.
      replayed: the schedule with these times: what the devices could do if they worked side by
        side and nothing else took time.
      recording: when the instructions of one step ran.
      examples_per_step: rows of the batch.
      tokens_per_step: as given.
      flops_per_step: model FLOPs by dtype, see `model_flops`.
    """

    plan: PipelinePlan
    step_s: float
    dispatch_s: float
    num_instructions: int
    instructions: tuple[InstructionTimes, ...]
    times: TaskTimes
    replayed: Timeline
    recording: StepRecording
    examples_per_step: int
    tokens_per_step: int | None
    flops_per_step: Mapping[str, float]

    @property
    def dispatch_per_instruction_s(self) -> float:
        """Host seconds to start one instruction, the mean over a step."""
        return self.dispatch_s / self.num_instructions

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Per mesh, seconds per step in programs, each run alone."""
        found = [0.0] * len(self.plan.meshes)
        for each in self.instructions:
            if each.kind not in MOVES:
                found[each.mesh] += each.total_s
        return tuple(found)

    @property
    def bubble_share(self) -> float:
        """Idle share of mesh-time from the first task to the last, by the measured durations.

        Of `replayed`, so comparable with the plan's: both are what the simulator says.
        """
        return self.replayed.bubble_share

    @property
    def idle_share(self) -> float:
        """Share of all meshes' time in `step_s` in which no program runs: `1 - busy / step`.

        Contains prepare, update and whatever the host takes. Where devices share hardware they are
        busy for longer in a step than alone, and this is too large.
        """
        return 1.0 - sum(self.busy_s) / (len(self.busy_s) * self.step_s)

    @property
    def examples_per_s(self) -> float:
        """Rows of the batch per second."""
        return self.examples_per_step / self.step_s

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second, on all devices together; None if nobody said how many a step has."""
        return None if self.tokens_per_step is None else self.tokens_per_step / self.step_s

    @property
    def model_flops_per_s(self) -> float:
        """Model FLOPs per second, on all devices together."""
        return sum(self.flops_per_step.values()) / self.step_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: share of `step_s` that the peak of all devices would need.

        The peaks are those of the plan's cluster, idle devices included.
        """
        return peak_s(self.flops_per_step, self.plan.cluster) / self.step_s

    def describe(self) -> str:
        """The figures as text."""
        rows: list[Row] = [
            ("step", f"{format_seconds(self.step_s)}, predicted "
             f"{format_seconds(self.plan.predicted.step_s)}"),
            ("dispatch", f"{format_seconds(self.dispatch_s)} for {self.num_instructions} "
             f"instructions, {format_seconds(self.dispatch_per_instruction_s)} each"),
            ("bubble", f"{self.bubble_share:.1%} by the measured durations, predicted "
             f"{self.plan.predicted.bubble_share:.1%}"),
            ("idle", f"{self.idle_share:.1%} of the meshes' time in a step"),
            ("examples/s", f"{self.examples_per_s:.4g}"),
        ]  # fmt: skip
        if self.tokens_per_s is not None:
            rows.append(("tokens/s", f"{self.tokens_per_s:.4g}"))
        rows.append(("model FLOP/s", f"{self.model_flops_per_s:.4g}, MFU {self.mfu:.2%}"))
        table: list[Row] = [("mesh", "instructions", "count", "each", "per step")]
        table += [
            (str(i.mesh), i.kind, str(i.count), format_seconds(i.median_s),
             format_seconds(i.total_s))
            for i in self.instructions
        ]  # fmt: skip
        measured = section(f"{self.plan.name}, measured", rows)
        return f"{measured}\n\n{section('Seconds, each alone', table, right={2, 3, 4})}"


def profile_step(
    executable: PipelineExecutable, args: Sequence[Any], *, steps: int = 5, repeats: int = 3,
    tokens_per_step: int | None = None,
) -> tuple[Any, StepMetrics]:  # fmt: skip
    """Measure what a step does with its time.

    In several processes all of them call this, and each gets the durations of all meshes; the
    seconds of a step and its recording are its own.

    Runs real steps on the same batch, each on the state that the one before returned: two to warm
    up, `steps` as they are, `repeats` that wait for every instruction, and one that is recorded.

    Args:
      executable: from `ParallelStep.compile`.
      args: arguments of the step, without static ones. The state is donated.
      steps: how many are timed as they are.
      repeats: how often every instruction is timed alone.
      tokens_per_step: for tokens/s.

    Returns:
      What the last step returned, and the metrics.

    Raises:
      TypeError: this is no pipeline, or the arguments are not those of the step.
      ValueError: `steps` or `repeats` is less than 1.
    """
    if not isinstance(executable, PipelineExecutable):
        raise TypeError(
            "profile_step takes what a step with pipeline stages compiles to: "
            f"step.compile(state, batch); found {type(executable).__name__}"
        )
    if steps < 1 or repeats < 1:
        raise ValueError(f"steps and repeats must be at least 1, found {steps} and {repeats}")
    leaves, tree = jax.tree.flatten(tuple(args))
    if tree != executable.in_tree:
        raise TypeError(
            f"the step was compiled for arguments {executable.in_tree}, found {tree}; static "
            "arguments are left out"
        )
    runner = _Runner(executable, leaves)
    runner.step()
    runner.record()  # compiles what only a recording runs
    timed = [runner.step() for _ in range(steps)]
    alone = [runner.alone() for _ in range(repeats)]
    recording = runner.record()
    typical = of_all_processes(executable, _medians(alone))
    schedule = executable.pipeline.schedule
    times = measured_times(schedule, typical)
    metrics = StepMetrics(
        plan=executable.plan,
        step_s=statistics.median(step_s for step_s, _ in timed),
        dispatch_s=statistics.median(dispatch_s for _, dispatch_s in timed),
        num_instructions=len(executable.program.instructions),
        instructions=by_class(typical),
        times=times,
        replayed=simulate(schedule, times),
        recording=recording,
        examples_per_step=max((aval.shape[0] for *_, aval in executable.batch), default=0),
        tokens_per_step=tokens_per_step,
        flops_per_step=model_flops(executable.pipeline.source),
    )
    return runner.result, metrics


def peak_s(flops: Mapping[str, float], cluster: Cluster) -> float:
    """Seconds that all devices of a cluster need at their peaks.

    Args:
      flops: by dtype.
      cluster: the hardware.
    """
    each_s = sum(n / cluster.device.peak_flops_per_s(dtype) for dtype, n in flops.items())
    return each_s / (cluster.num_devices * cluster.shared_compute)


def by_class(instructions: Sequence[TimedInstruction]) -> tuple[InstructionTimes, ...]:
    """Seconds of every class on every mesh, by mesh, in the order of their first occurrence."""
    groups: dict[tuple[int, str], list[float]] = defaultdict(list)
    for each in instructions:
        groups[each.mesh, each.kind].append(each.seconds)
    return tuple(
        InstructionTimes(
            kind=kind, mesh=mesh, count=len(group), total_s=sum(group),
            median_s=statistics.median(group),
        )
        for (mesh, kind), group in sorted(groups.items(), key=lambda item: item[0][0])
    )  # fmt: skip


def measured_times(schedule: Schedule, instructions: Sequence[TimedInstruction]) -> TaskTimes:
    """Measured durations as the simulator takes them.

    Moves of one task count together, as transfers to the next stage or to the one before; what is
    prepared, updated or moved for these as the end of the step. Of moves between processes only
    what the sender does is known.

    Args:
      schedule: the tasks.
      instructions: of one step, in order, each timed alone.
    """
    tasks: dict[tuple[str, int], list[float]] = defaultdict(list)
    sends: dict[tuple[str, int], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    tails = [0.0] * schedule.num_meshes
    latest: dict[int, Task | None] = {}
    for each in instructions:
        if each.kind == RECEIVE:
            continue
        moved = each.kind in MOVES
        if not moved:
            latest[each.mesh] = each.task
        task = latest.get(each.mesh)
        if task is None:
            tails[each.mesh] += each.seconds
        elif not moved:
            tasks[task.kind, task.stage].append(each.seconds)
        elif each.target != each.mesh:
            direction = FORWARD if task.kind == FORWARD else BACKWARD
            sends[direction, task.stage][task.microbatch] += each.seconds

    def of_task(kind: str) -> tuple[float, ...]:
        found = [tasks.get((kind, stage)) for stage in range(schedule.num_stages)]
        return tuple(statistics.median(each) if each else 0.0 for each in found)

    def of_sends(direction: str, stages: range) -> tuple[float, ...]:
        found = [sends.get((direction, stage)) for stage in stages]
        return tuple(statistics.median(each.values()) if each else 0.0 for each in found)

    last = schedule.num_stages - 1
    return TaskTimes(
        forward_s=of_task(FORWARD),
        backward_s=of_task(BACKWARD),
        backward_input_s=of_task(BACKWARD_INPUT),
        backward_weight_s=of_task(BACKWARD_WEIGHT),
        forward_transfer_s=of_sends(FORWARD, range(last)),
        backward_transfer_s=of_sends(BACKWARD, range(1, last + 1)),
        tail_s=tuple(tails),
    )


def of_all_processes(
    executable: PipelineExecutable, instructions: Sequence[TimedInstruction]
) -> list[TimedInstruction]:
    """The instructions of all meshes, each from the first process that has devices of it.

    All processes call this, those without others get back what they have.
    """
    group = process_group()
    if group is None:
        return list(instructions)
    owner = {
        stage.mesh: min(d.process_index for d in mesh.devices.flat)
        for stage, mesh in zip(executable.plan.stages, executable.meshes, strict=True)
    }
    own = [asdict(each) for each in instructions if owner[each.mesh] == group.me]
    heard = group.exchange("profile", json.dumps(own).encode())
    rows = [row for data in heard for row in json.loads(data)]
    return [
        TimedInstruction(**{**row, "task": row["task"] and Task(**row["task"])}) for row in rows
    ]


def _medians(steps: Sequence[Sequence[TimedInstruction]]) -> list[TimedInstruction]:
    """The instructions of a step with the median seconds of several."""
    return [
        replace(each[0], start_s=0.0, end_s=statistics.median(e.seconds for e in each))
        for each in zip(*steps, strict=True)
    ]


class _Runner:
    """Runs steps, each on the state that the one before returned."""

    def __init__(self, executable: PipelineExecutable, leaves: Sequence[Any]) -> None:
        self.executable = executable
        self.leaves = list(leaves)
        self.result: Any = None

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and of them those until its call returned."""
        jax.block_until_ready(self.leaves)
        begun = time.perf_counter()
        result = self.executable.run(self.leaves)
        returned = time.perf_counter()
        jax.block_until_ready(result)
        ended = time.perf_counter()
        self.keep(result)
        return ended - begun, returned - begun

    def alone(self) -> tuple[TimedInstruction, ...]:
        """A step that waits for every instruction."""
        result, timed = time_alone(self.executable, self.leaves)
        self.keep(result)
        return timed

    def record(self) -> StepRecording:
        """A step whose instructions are watched."""
        result, recording = record_step(self.executable, self.leaves)
        self.keep(result)
        return recording

    def keep(self, result: Any) -> None:
        """Take the state over."""
        self.result = result
        found = jax.tree.leaves(result)
        for position, output in state_positions(self.executable.pipeline.source).items():
            self.leaves[position] = found[output]


def state_positions(source: LayeredStep) -> dict[int, int]:
    """Input position -> output position of every state leaf, as the user has them."""
    aliases = source.names.aliases
    output_at = {place.positions[0]: i for i, place in enumerate(source.places.outputs)}
    return {
        i: output_at[aliases[place.positions[0]]]
        for i, place in enumerate(source.places.inputs)
        if place.positions[0] in aliases
    }
