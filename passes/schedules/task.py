"""What a pipeline schedule is: per mesh, the list of tasks in the order in which it runs them.

A *stage* is a part of the model; a mesh holds one or several (virtual stages). A *pipeline* is a
way through the meshes, from stage 0 to the last. Most schedules have one; a bidirectional schedule
has two, which cross the same meshes in opposite directions, so that each stage is held, with its
own copy of the parameters, by the two meshes that the two pipelines name for it. Every microbatch
takes one pipeline.

The step's end (gradient synchronisation, optimizer update) is no task: see `times.TaskTimes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FORWARD = "forward"
BACKWARD = "backward"
BACKWARD_INPUT = "backward_input"
BACKWARD_WEIGHT = "backward_weight"
KINDS = (FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT)


@dataclass(frozen=True, slots=True)
class Task:
    """One program run of one stage on one microbatch.

    Attributes:
      kind: `forward`; `backward`, the whole of it; or its two halves, `backward_input` (gradient
        of the stage's input, which the stage before waits for) and `backward_weight` (gradient of
        its parameters, which nobody waits for).
      stage: index of the stage.
      microbatch: index of the microbatch.
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of stage {self.stage}, microbatch {self.microbatch}"


def check_counts(name: str, counts: Mapping[str, int], *, even: bool = False) -> None:
    """Refuse numbers of which there is no schedule.

    Args:
      name: of the schedule.
      counts: how many of what.
      even: whether they must be even, as for two pipelines in opposite directions.

    Raises:
      ValueError: a count is not a positive integer, or odd where it must be even.
    """
    for what, number in counts.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} needs a number of {what} from 1 on, found {number!r}")
        if even and number % 2:
            raise ValueError(
                f"{name} runs two pipelines in opposite directions, so the number of {what} must "
                f"be even, found {number}; use {number + 1}, or a schedule of one direction"
            )


@dataclass(frozen=True, slots=True)
class Schedule:
    """The tasks of one training step, or of one inference batch.

    Attributes:
      name: name of the schedule in `registry.SCHEDULES`, or any other name.
      placements: per pipeline, the mesh of each stage.
      pipeline_of: per microbatch, the pipeline it takes.
      tasks: per mesh, its tasks in order.
    """

    name: str
    placements: tuple[tuple[int, ...], ...]
    pipeline_of: tuple[int, ...]
    tasks: tuple[tuple[Task, ...], ...]

    def __post_init__(self) -> None:
        if not self.placements or not self.placements[0] or not self.pipeline_of:
            raise ValueError(
                "a schedule needs at least one pipeline, one stage and one microbatch, found "
                f"placements {self.placements!r} and {len(self.pipeline_of)} microbatches"
            )
        if len({len(placement) for placement in self.placements}) > 1:
            raise ValueError(
                "all pipelines must have the same stages, found "
                f"{[len(placement) for placement in self.placements]} stages"
            )
        for pipeline, placement in enumerate(self.placements):
            for stage, mesh in enumerate(placement):
                if not 0 <= mesh < len(self.tasks):
                    raise ValueError(
                        f"pipeline {pipeline} puts stage {stage} on mesh {mesh}, but there are "
                        f"task lists for meshes 0 to {len(self.tasks) - 1} only"
                    )
        for microbatch, pipeline in enumerate(self.pipeline_of):
            if not 0 <= pipeline < len(self.placements):
                raise ValueError(
                    f"microbatch {microbatch} takes pipeline {pipeline}, but there are pipelines "
                    f"0 to {len(self.placements) - 1} only"
                )

    @property
    def num_stages(self) -> int:
        """Stages of the model, virtual ones counted singly and copies once."""
        return len(self.placements[0])

    @property
    def num_meshes(self) -> int:
        """Meshes, idle ones included."""
        return len(self.tasks)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of all pipelines together."""
        return len(self.pipeline_of)

    def mesh_of(self, stage: int, microbatch: int) -> int:
        """The mesh that runs all tasks of a stage on a microbatch."""
        return self.placements[self.pipeline_of[microbatch]][stage]

    def meshes_of_stage(self, stage: int) -> tuple[int, ...]:
        """The meshes that hold a copy of a stage's parameters, ascending."""
        return tuple(sorted({placement[stage] for placement in self.placements}))

    def stages_of_mesh(self, mesh: int) -> tuple[int, ...]:
        """The stages whose parameters a mesh holds, ascending."""
        return tuple(
            stage
            for stage in range(self.num_stages)
            if any(placement[stage] == mesh for placement in self.placements)
        )
