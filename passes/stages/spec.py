"""What a pipeline is, before any layout is chosen: `PipelineSpec`."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from alpa_lite.passes.inter_op import Submesh


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage.

    Attributes:
      layers: its layers, ascending and consecutive.
      submesh: shape of the devices it runs on.
      mesh_shape: sizes of the logical mesh's axes; searched if None.
      remat: what the backward pass computes again; one of `REMAT_POLICIES`.
    """

    layers: tuple[int, ...]
    submesh: Submesh
    mesh_shape: tuple[int, ...] | None
    remat: str


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """All stages and how microbatches go through them.

    Attributes:
      stages: in the order of the forward pass; with `num_virtual` v > 1, stage s runs on the
        submesh that the schedule gives it, and stages that share one have the same shape.
      num_microbatches: microbatches per step.
      schedule: a name of `SCHEDULES`.
      num_virtual: stages per submesh.
    """

    stages: tuple[StageSpec, ...]
    num_microbatches: int
    schedule: str
    num_virtual: int = 1

    @property
    def num_meshes(self) -> int:
        """Number of submeshes."""
        return len(self.stages) // self.num_virtual

    def __str__(self) -> str:
        runs = [
            (each, len(list(alike)))
            for each, alike in itertools.groupby(str(s.submesh) for s in self.stages)
        ]
        meshes = " + ".join(each if n == 1 else f"{n} x {each}" for each, n in runs)
        remat = Counter(s.remat for s in self.stages)
        kept = " + ".join(each if len(remat) == 1 else f"{n} x {each}" for each, n in remat.items())
        stages = f"{len(self.stages)} stage{'s' * (len(self.stages) > 1)}"
        count = f"{self.num_microbatches} microbatch{'es' * (self.num_microbatches > 1)}"
        return f"{stages} on {meshes}, {count}, {self.schedule}, remat {kept}"
