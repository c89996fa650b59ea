"""Parallel methods with pipeline stages: searched, on a fixed grid, or given by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alpa_lite.ir.flops import is_matmul
from alpa_lite.ir.sharding import Mesh
from alpa_lite.passes.decision_graph import NONE, Contraction
from alpa_lite.passes.methods import Method, batch_factors
from alpa_lite.passes.schedules import schedule_name
from alpa_lite.passes.schedules.registry import check_shape
from alpa_lite.passes.strategies import StrategySet
from alpa_lite.passes.zero import STAGES, restrict_state

# How the forward pass of a layer is differentiated: what is kept for the backward pass.
NO_REMAT = "none"
SELECTIVE_REMAT = "dots"
FULL_REMAT = "full"
REMAT_POLICIES = (NO_REMAT, SELECTIVE_REMAT, FULL_REMAT)


@dataclass(frozen=True, kw_only=True)
class PipelineMethod(Method):
    """Base of the methods with pipeline stages.

    Attributes:
      schedule: order of the microbatches' forward and backward passes: a name of
        `alpa_lite.passes.schedules.SCHEDULES`, or "auto".
      remat: what the backward pass computes again, per layer: "none"; "dots" (everything but
        matrix products without batch dims); "full" (a layer keeps its input only); or "auto".
      layer_num: layers the forward pass is cut into, or "auto" for one per block of the model.
      num_virtual: stages per submesh, for interleaved schedules.
    """

    schedule: str = "1f1b"
    remat: str = NO_REMAT
    layer_num: int | Literal["auto"] = "auto"
    num_virtual: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "auto":
            object.__setattr__(self, "schedule", schedule_name(self.schedule))
        if self.remat not in (*REMAT_POLICIES, "auto"):
            raise ValueError(
                f'remat must be one of {", ".join(REMAT_POLICIES)} or "auto", found {self.remat!r}'
            )
        if self.layer_num != "auto":
            _check_count("layer_num", self.layer_num)
        _check_count("num_virtual", self.num_virtual)

    def searches_mesh(self) -> bool:
        """Logical meshes of stages are searched where none is prescribed."""
        return True


@dataclass(frozen=True, kw_only=True)
class PipeshardParallel(PipelineMethod):
    """Stages, layouts, schedule, rematerialisation and microbatches are searched.

    Stages may have different submeshes; those of a scan over layers are of one size.

    Attributes:
      num_stages: how many stages, or "auto".
      time_limit_s: of the search, tracing included; the best pipeline found by then is returned.
    """

    schedule: str = "auto"
    remat: str = "auto"
    num_stages: int | Literal["auto"] = "auto"
    time_limit_s: float = 120.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_stages != "auto":
            _check_count("num_stages", self.num_stages)


@dataclass(frozen=True)
class ThreeDParallel(PipelineMethod):
    """A fixed grid: `pp` stages of equal size, each on `dp` x `tp` devices.

    On every stage the batch is split over mesh axis `dp` and nothing else is; what is split over
    `tp`, and how the state is laid out over both, is searched.

    Attributes:
      dp, tp, pp: sizes.
      zero: what is split over `dp` besides the batch: 0 nothing, 1 the optimizer state, 2 also the
        gradients, 3 also the parameters (FSDP); searched if None.
      split_weights: whether matrix products must be split over `tp` by their weights or heads, as
        in Megatron-LM, and never by tokens (dim 1 of the batch).
    """

    dp: int
    tp: int
    pp: int
    zero: int | None = None
    split_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dp", "tp", "pp"):
            _check_count(name, getattr(self, name))
        if self.zero is not None and (isinstance(self.zero, bool) or self.zero not in STAGES):
            raise ValueError(f"zero must be 0, 1, 2, 3 or None, found {self.zero!r}")
        if self.num_microbatches == "auto":
            object.__setattr__(self, "num_microbatches", max(1, 2 * self.pp))
        if self.schedule != "auto":
            check_shape(self.schedule, self.pp, int(self.num_microbatches), self.num_virtual)

    def allowed(
        self, contraction: Contraction, classes: Sequence[int], strategies: Sequence[StrategySet],
        mesh: Mesh,
    ) -> list[np.ndarray]:  # fmt: skip
        """The strategies that split the batch over axis `dp`, and over no other."""
        masks = super().allowed(contraction, classes, strategies, mesh)
        batch = batch_factors(contraction)
        for node in contraction.nodes:
            cls, rows = classes[node.id], batch[node.id]
            if rows:
                fits = np.array(
                    [
                        all(
                            (factor in rows) == (name == "dp")
                            for name, factor in zip(mesh.names, a, strict=True)
                        )
                        for a in strategies[cls].assignments
                    ]
                )
                if (masks[cls] & fits).any():
                    masks[cls] &= fits
        if self.split_weights:
            self._keep_tokens_whole(masks, contraction, classes, strategies, mesh)
        if self.zero is not None:
            restrict_state(
                masks, contraction, classes, strategies, mesh, axis="dp", stage=self.zero
            )
        return masks

    def _keep_tokens_whole(
        self, masks: Sequence[np.ndarray], contraction: Contraction, classes: Sequence[int],
        strategies: Sequence[StrategySet], mesh: Mesh,
    ) -> None:  # fmt: skip
        """Forbid, in place, matrix products that axis `tp` splits by tokens or repeats."""
        if "tp" not in mesh.names:
            return
        position = mesh.names.index("tp")
        tokens = batch_factors(contraction, 1)
        for node in contraction.nodes:
            if not any(is_matmul(contraction.ops[i].name) for i in node.ops):
                continue
            cls = classes[node.id]
            on_axis = [assignment[position] for assignment in strategies[cls].assignments]
            whole = np.array([f not in tokens[node.id] and f != NONE for f in on_axis])
            if (masks[cls] & whole).any():
                masks[cls][:] = masks[cls] & whole


@dataclass(frozen=True)
class ManualPipeline(PipelineMethod):
    """Stages given by hand; layouts within a stage are searched.

    Attributes:
      layers: per stage, its layers: `[[0, 1, 2], [3, 4]]`; every layer once, in order.
      submeshes: per stage, (hosts, devices of each host).
      mesh_shapes: per stage, the sizes of its logical mesh; searched if None.
    """

    layers: Sequence[Sequence[int]]
    submeshes: Sequence[tuple[int, int]]
    mesh_shapes: Sequence[Sequence[int] | None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(tuple(each) for each in self.layers))
        object.__setattr__(self, "submeshes", tuple(tuple(each) for each in self.submeshes))
        stages = len(self.layers)
        shapes = self.mesh_shapes if self.mesh_shapes is not None else [None] * stages
        shapes = tuple(None if shape is None else tuple(shape) for shape in shapes)
        object.__setattr__(self, "mesh_shapes", shapes)
        meshes, rest = divmod(stages, self.num_virtual)
        for name, found in (("submeshes", len(self.submeshes)), ("mesh_shapes", len(shapes))):
            if found not in (stages, meshes):
                raise ValueError(f"layers has {stages} stages, but {name} has {found} entries")
        if rest:
            raise ValueError(f"{stages} stages are no multiple of num_virtual={self.num_virtual}")
        for shape in self.submeshes:
            if len(shape) != 2 or any(not isinstance(n, int) or n < 1 for n in shape):
                raise ValueError(f"a submesh is (hosts, devices of each host), found {shape!r}")
        if self.num_microbatches == "auto":
            object.__setattr__(self, "num_microbatches", max(1, 2 * meshes))


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, found {value!r}")
