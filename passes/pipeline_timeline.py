"""The simulated step of a pipeline plan, from the plan alone: `plan_timeline`.

A plan file holds seconds and bytes of every stage, so that nothing needs to be traced, and no
device is needed, to see when everything is expected to happen.
"""

from __future__ import annotations

from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.schedules import (
    Schedule,
    StageBytes,
    TaskTimes,
    Timeline,
    make_schedule,
    simulate,
)


def plan_timeline(plan: PipelinePlan) -> Timeline:
    """When every task of a step is expected to start and end."""
    return simulate(plan_schedule(plan), plan_times(plan))


def plan_schedule(plan: PipelinePlan) -> Schedule:
    """The tasks of every mesh."""
    return make_schedule(plan.schedule, len(plan.meshes), plan.num_microbatches, plan.num_virtual)


def plan_times(plan: PipelinePlan) -> TaskTimes:
    """Seconds of all tasks and transfers, as the simulator takes them.

    Where the backward pass is split, its parts take half of it each, as `StageCost` has it.
    """
    stages = [s for s in plan.stages if s.pipeline == 0]
    tails = [0.0] * len(plan.meshes)
    for each in plan.stages:
        tails[each.mesh] += each.per_step_s
    return TaskTimes(
        forward_s=tuple(s.forward_s for s in stages),
        backward_s=tuple(s.backward_s for s in stages),
        backward_input_s=tuple(s.backward_s / 2 for s in stages),
        backward_weight_s=tuple(s.backward_s / 2 for s in stages),
        forward_transfer_s=tuple(s.send_s for s in stages[:-1]),
        backward_transfer_s=tuple(s.return_s for s in stages[1:]),
        tail_s=tuple(tails),
    )


def plan_bytes(plan: PipelinePlan) -> StageBytes:
    """Bytes on one device of every stage, for `memory_over_time`.

    A stage's peak is what it has at all times, and what each of the most microbatches that it has
    in flight keeps. With a split backward pass all of that is kept until the second part ends.
    """
    stages = [s for s in plan.stages if s.pipeline == 0]
    kept = tuple(round(s.stash_bytes) for s in stages)
    return StageBytes(
        resident_bytes=tuple(
            max(0, round(s.peak_bytes) - s.in_flight * each)
            for s, each in zip(stages, kept, strict=True)
        ),
        activation_bytes=kept,
        stash_bytes=kept,
    )
