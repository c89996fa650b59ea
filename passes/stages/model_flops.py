"""Floating-point operations that a model needs, whatever a plan makes of it: `model_flops`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from alpa_lite import compat
from alpa_lite.ir.flops import equation_flops, is_matmul
from alpa_lite.passes.stages.source import LayeredStep

_FORWARD_AND_BACKWARD = 3.0
# The backward pass has two products for each of the forward pass.


def model_flops(source: LayeredStep) -> Mapping[str, float]:
    """FLOPs of one step by dtype: three times the matrix products of the forward pass.

    The convention of model FLOPs utilisation: what is computed again in the backward pass, and
    everything but matrix products and convolutions, does not count.

    Args:
      source: the step, traced.
    """
    times = _FORWARD_AND_BACKWARD * source.num_microbatches
    found = _matmul_flops(source.parts.loop)
    return {dtype: times * flops for dtype, flops in found.items()}


def _matmul_flops(equations: Iterable[Any]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for eqn in equations:
        params = compat.equation_params(eqn)
        name = eqn.primitive.name
        if is_matmul(name):
            ins, outs = [a.aval for a in eqn.invars], [v.aval for v in eqn.outvars]
            total[str(ins[0].dtype)] += equation_flops(name, params, ins, outs)
            continue
        bodies = [
            _matmul_flops(compat.jaxpr_parts(body)[0].eqns)
            for value in params.values()
            for body in (value if isinstance(value, tuple | list) else (value,))
            if hasattr(body, "eqns")
        ]
        if bodies:
            most = max(bodies, key=lambda each: sum(each.values()))  # of a conditional's branches
            for dtype, flops in most.items():
                total[dtype] += flops * (params["length"] if name == "scan" else 1)
    return total
