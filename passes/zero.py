"""ZeRO over one mesh axis: which strategies keep parameters, gradients and optimizer state apart.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) splits over the data-parallel devices, by stage:
1 the optimizer state, 2 also the gradients, 3 also the parameters. What a stage does not split is
whole on every device of the axis. Other axes are free.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alpa_lite.ir.graph import UPDATE
from alpa_lite.ir.sharding import Mesh
from alpa_lite.passes.decision_graph import NONE, Contraction, Node
from alpa_lite.passes.strategies import PARTIAL, StrategySet

STAGES = (0, 1, 2, 3)


def restrict_state(
    masks: Sequence[np.ndarray], contraction: Contraction, classes: Sequence[int],
    strategies: Sequence[StrategySet], mesh: Mesh, *, axis: str, stage: int,
) -> None:  # fmt: skip
    """Forbid, in place, layouts of the state that a ZeRO stage does not have on a mesh axis.

    Tensors that no strategy splits over the axis (scalars, odd sizes) stay as they are.

    Args:
      masks: per class `[num_strategies]` of those still allowed.
      contraction: the decision graph.
      classes: of its nodes.
      strategies: per class.
      mesh: the mesh.
      axis: of data parallelism.
      stage: 0 to 3.
    """
    if axis not in mesh.names:
        return
    position = mesh.names.index(axis)
    for node in contraction.nodes:
        first = _first_stage_that_splits(contraction, node)
        if first is None:
            continue
        cls = classes[node.id]
        on_axis = np.array([a[position] for a in strategies[cls].assignments])
        split = (on_axis != NONE) & (on_axis != PARTIAL)
        fits = masks[cls] & (split if stage >= first else ~split)
        if fits.any():
            masks[cls][:] = fits


def _first_stage_that_splits(contraction: Contraction, node: Node) -> int | None:
    """1 for optimizer state, 2 for gradients, 3 for parameters, None for anything else."""
    ops = [contraction.ops[i] for i in node.ops]
    kinds = {op.kind for op in ops}
    if "state" in kinds:
        results = {result for op in ops if op.kind == "state" for result in op.results}
        readers = (op for op in contraction.ops if results & set(contraction.operands[op.id]))
        return 3 if any(op.phase != UPDATE for op in readers) else 1
    if "gradient" in kinds:
        return 2
    if kinds.isdisjoint(("batch", "argument")) and all(op.phase == UPDATE for op in ops):
        return 1
    return None
