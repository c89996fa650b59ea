"""Steps as pictures: `write_trace` writes what chrome://tracing and ui.perfetto.dev open.

Every run (a plan's simulated step, a measured step) is a process of its own, so that they stand
below each other with the same time scale. A mesh is a track, filled from the start to the end of
the step: where it neither computes nor updates it has a slice of kind `bubble`, so the slices of a
mesh add up to the seconds of the step. Every pair of meshes that sends is another track. A curve
shows the bytes in use on a device of each mesh.
"""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.pipeline_timeline import plan_bytes, plan_schedule, plan_times
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.schedules import (
    FORWARD,
    MeshMemory,
    Timeline,
    memory_over_time,
    simulate,
    transfers,
)
from alpa_lite.runtime.metrics import StepMetrics
from alpa_lite.runtime.timing import StepRecording

BUBBLE = "bubble"
"""Kind of the slices in which a mesh waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Something that takes time.

    Attributes:
      name: what it is.
      kind: its class.
      mesh: where it runs; of what is sent, from where.
      target: of what is sent, where to; else None.
      start_s, end_s: seconds from the start of the run.
    """

    name: str
    kind: str
    mesh: int
    target: int | None
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRun:
    """One step, to be drawn.

    Attributes:
      name: shown.
      slices: those of one mesh, or of one pair, do not overlap.
      memory: per mesh, (seconds, bytes in use on a device from then on); empty if it is not known.
    """

    name: str
    slices: tuple[Slice, ...]
    memory: tuple[tuple[tuple[float, int], ...], ...] = ()


def timeline_run(
    name: str, timeline: Timeline, *, tail_s: Sequence[float] = (),
    memory: Sequence[MeshMemory] = (),
) -> TraceRun:  # fmt: skip
    """A simulated step.

    Args:
      name: shown.
      timeline: from `simulate`.
      tail_s: per mesh, seconds of the end of the step, as given to `simulate`.
      memory: per mesh, from `memory_over_time`.
    """
    schedule = timeline.schedule
    sent = transfers(schedule)
    found = []
    for mesh, tasks in enumerate(schedule.tasks):
        times = zip(
            timeline.start_s[mesh], timeline.end_s[mesh], timeline.send_start_s[mesh],
            timeline.send_end_s[mesh], strict=True,
        )  # fmt: skip
        for task, (start_s, end_s, send_start_s, send_end_s) in zip(tasks, times, strict=True):
            found.append(
                Slice(
                    name=str(task), kind=task.kind, mesh=mesh, target=None, start_s=start_s,
                    end_s=end_s,
                )
            )  # fmt: skip
            if task in sent:
                what = "activation" if task.kind == FORWARD else "cotangent"
                first = schedule.pipeline_of[task.microbatch] * schedule.num_stages
                stage = first + sent[task].consumer.stage
                found.append(
                    Slice(
                        name=f"{what} of microbatch {task.microbatch} to stage {stage}",
                        kind="move", mesh=mesh, target=sent[task].target, start_s=send_start_s,
                        end_s=send_end_s,
                    )
                )  # fmt: skip
    for mesh, (start_s, seconds) in enumerate(zip(timeline.tail_start_s, tail_s, strict=False)):
        found.append(
            Slice(
                name=f"update of mesh {mesh}", kind="update", mesh=mesh, target=None,
                start_s=start_s, end_s=start_s + seconds,
            )
        )  # fmt: skip
    curves = tuple(
        tuple(zip(map(float, each.times_s), map(int, each.bytes_in_use), strict=True))
        for each in memory
    )
    return TraceRun(name=name, slices=_with_bubbles(found, timeline.step_s), memory=curves)


def plan_run(plan: Plan | PipelinePlan, name: str = "simulated") -> TraceRun:
    """The step that a plan expects, from the plan alone.

    A plan of one mesh holds totals, not when each operation runs: all compute is one slice, and
    every group of collectives another.
    """
    if isinstance(plan, Plan):
        return _one_mesh_run(plan, name)
    times = plan_times(plan)
    timeline = simulate(plan_schedule(plan), times)
    memory = memory_over_time(timeline, plan_bytes(plan))
    return timeline_run(name, timeline, tail_s=times.tail_s, memory=memory)


def recorded_run(recording: StepRecording, name: str = "measured") -> TraceRun:
    """A step as it ran."""
    slices = tuple(
        Slice(
            name=each.name, kind=each.kind, mesh=each.mesh, target=each.target,
            start_s=each.start_s, end_s=each.end_s,
        )
        for each in recording.instructions
    )  # fmt: skip
    return TraceRun(
        name=name, slices=_with_bubbles(slices, recording.step_s), memory=recording.memory
    )


def write_trace(path: str | Path, *runs: TraceRun | Plan | PipelinePlan | StepMetrics) -> None:
    """Write runs as one trace in Chrome's JSON format; it appears whole or not at all.

    Args:
      path: the file; compressed if its name ends in `.gz`.
      *runs: what to show, in this order: a plan's simulated step, a measured one.

    Example:
      >>> import alpa_lite
      >>> executable = train_step.compile(state, batch)  # doctest: +SKIP
      >>> result, metrics = alpa_lite.profile_step(executable, (state, batch))  # doctest: +SKIP
      >>> alpa_lite.write_trace("step.json.gz", executable.plan, metrics)  # doctest: +SKIP
    """
    path = Path(path)
    data = trace_json([_as_run(run) for run in runs])
    text = json.dumps(data, allow_nan=False).encode()
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def trace_json(runs: Sequence[TraceRun]) -> dict[str, Any]:
    """Runs in Chrome's trace format (the "Trace Event Format", JSON object form)."""
    events: list[dict[str, Any]] = []
    for process, run in enumerate(runs):
        events += _run_events(process, run)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _as_run(run: TraceRun | Plan | PipelinePlan | StepMetrics) -> TraceRun:
    if isinstance(run, Plan | PipelinePlan):
        return plan_run(run)
    return recorded_run(run.recording) if isinstance(run, StepMetrics) else run


def _one_mesh_run(plan: Plan, name: str) -> TraceRun:
    """Compute, then one group of collectives after the other: no overlap is assumed."""
    predicted = plan.predicted
    parts = [("compute", "compute", predicted.compute_s)]
    for each in predicted.collectives:
        what = f"{each.kind} over {'+'.join(each.axes)}, {each.times_per_step:g} times"
        parts.append((what, "communication", each.seconds_per_step))
    slices = []
    now_s = 0.0
    for what, kind, seconds in parts:
        slices.append(
            Slice(
                name=what, kind=kind, mesh=0, target=None, start_s=now_s, end_s=now_s + seconds
            )
        )  # fmt: skip
        now_s += seconds
    return TraceRun(
        name=name, slices=_with_bubbles(slices, predicted.step_s),
        memory=(((0.0, round(predicted.peak_bytes)),),),
    )  # fmt: skip


def _with_bubbles(slices: Iterable[Slice], step_s: float) -> tuple[Slice, ...]:
    """The same slices, and one of kind `bubble` in every gap on a mesh's own track."""
    slices = tuple(slices)
    found = []
    for mesh in sorted({s.mesh for s in slices if s.target is None}):
        own = sorted((s.start_s, s.end_s) for s in slices if (s.mesh, s.target) == (mesh, None))
        free_s = 0.0
        for start_s, end_s in [*own, (step_s, step_s)]:
            if start_s > free_s:
                found.append(
                    Slice(
                        name=BUBBLE, kind=BUBBLE, mesh=mesh, target=None, start_s=free_s,
                        end_s=start_s,
                    )
                )  # fmt: skip
            free_s = max(free_s, end_s)
    return (*slices, *found)


def _run_events(process: int, run: TraceRun) -> Iterable[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": run.name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
    # Every mesh, then what it sends.
    tracks = sorted(
        {(s.mesh, s.target) for s in run.slices}, key=lambda t: (t[0], -1 if t[1] is None else t[1])
    )
    for number, (mesh, target) in enumerate(tracks):
        name = f"mesh {mesh}" if target is None else f"mesh {mesh} to mesh {target}"
        at = {"pid": process, "tid": number}
        yield {"ph": "M", "name": "thread_name", **at, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", **at, "args": {"sort_index": number}}
    where = {track: number for number, track in enumerate(tracks)}
    for each in sorted(run.slices, key=lambda s: (s.start_s, s.end_s)):
        begun, ended = _nanoseconds(each.start_s), _nanoseconds(each.end_s)
        if ended > begun:
            yield {
                "ph": "X", "name": each.name, "cat": each.kind, "pid": process,
                "tid": where[each.mesh, each.target], "ts": begun / 1e3,
                "dur": (ended - begun) / 1e3,
            }  # fmt: skip
    for mesh, curve in enumerate(run.memory):
        for moment_s, in_use in curve:
            yield {
                "ph": "C", "name": f"bytes in use, mesh {mesh}", "pid": process,
                "ts": _nanoseconds(moment_s) / 1e3, "args": {"bytes": in_use},
            }  # fmt: skip


def _nanoseconds(seconds: float) -> int:
    """Whole ones, so that slices that touch do not overlap after rounding."""
    return round(seconds * 1e9)
