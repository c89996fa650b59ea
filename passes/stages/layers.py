"""The forward pass as a sequence of layers: what moves with the pipeline, and where to cut it.

In: `StepParts`. Out: `LayerGraph`: the equations of the loop that have to be placed on one stage
each, in order, grouped into layers by `alpa_lite.passes.inter_op.cluster_layers`; and the *free*
equations that every stage repeats if it reads them.

Free are equations of parameters alone (casts: otherwise one cast of all parameters at the start of
the loss function would put them all on the first stage) and cheap ones that no parameter reaches
(masks, positions, splits of PRNG keys).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from alpa_lite import compat
from alpa_lite.errors import StepError
from alpa_lite.ir.flops import equation_flops, is_matmul
from alpa_lite.ir.graph import aval_bytes, param_key
from alpa_lite.ir.marks import layer_mark_p
from alpa_lite.passes.inter_op import cluster_layers, crossing_bytes
from alpa_lite.passes.stages.parts import StepParts, variables

# A chain of equations that no parameter reaches is repeated on every stage that reads it if each
# has at most this share of the FLOPs of the forward pass.
_FREE_SHARE = 1e-3

# Bytes across a cut are counted with so many bits.
_BYTES_BITS = 32


@dataclass(frozen=True, slots=True, eq=False)
class LayerGraph:
    """The loop's equations as layers.

    Attributes:
      parts: the step.
      free: positions in `parts.loop` of equations that are repeated where they are read.
      layers: per layer, positions in `parts.loop`, ascending; all that are not free.
      flops: `[num_layers]` FLOPs of one forward pass over one microbatch.
      keys: per layer, a text that is equal for layers which compute the same.
      notes: what the user should know.
    """

    parts: StepParts
    free: frozenset[int]
    layers: tuple[tuple[int, ...], ...]
    flops: tuple[float, ...]
    keys: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)


def build_layers(parts: StepParts, layer_num: int | Literal["auto"] = "auto") -> LayerGraph:
    """Group the forward pass into layers.

    If the step calls `alpa_lite.mark_layer`, layers end exactly there and `layer_num` must be
    "auto" or their number.

    Args:
      parts: of the step.
      layer_num: number of layers, or "auto" for as many as there are blocks.

    Raises:
      StepError: fewer heavy operations than `layer_num`, or marks and `layer_num` disagree.
    """
    flops = np.array([jaxpr_equation_flops(eqn) for eqn in parts.loop])
    free = _free(parts, flops)
    placed = [i for i in range(len(parts.loop)) if i not in free]
    marks = [n for n, i in enumerate(placed) if parts.loop[i].primitive is layer_mark_p]
    notes: list[str] = []
    if marks:
        cuts = sorted({m + 1 for m in marks} - {len(placed)})
        if layer_num not in ("auto", len(cuts) + 1):
            raise StepError(
                f"the step marks {len(cuts) + 1} layers with mark_layer, but layer_num is "
                f"{layer_num}. Drop one of both."
            )
    else:
        cuts = list(_clustered(parts, placed, flops, layer_num, notes))
    bounds = [0, *cuts, len(placed)]
    layers = tuple(tuple(placed[a:b]) for a, b in itertools.pairwise(bounds))
    return LayerGraph(
        parts, frozenset(free), layers, tuple(float(flops[list(each)].sum()) for each in layers),
        tuple(_layer_key(parts, each) for each in layers), tuple(notes),
    )  # fmt: skip


def jaxpr_equation_flops(eqn: Any) -> float:
    """FLOPs of an equation and all that is nested in it."""
    params = compat.equation_params(eqn)
    bodies = [b for value in params.values() for b in _bodies(value)]
    if not bodies:
        ins, outs = [a.aval for a in eqn.invars], [v.aval for v in eqn.outvars]
        return equation_flops(eqn.primitive.name, params, ins, outs)
    each = [sum(map(jaxpr_equation_flops, compat.jaxpr_parts(b)[0].eqns)) for b in bodies]
    if eqn.primitive.name == "scan":
        return params["length"] * each[0]
    return max(each)


def _bodies(value: Any) -> list[Any]:
    """The jaxprs in a parameter of an equation."""
    items = value if isinstance(value, tuple | list) else (value,)
    return [x for x in items if hasattr(x, "eqns")]


def _free(parts: StepParts, flops: np.ndarray) -> set[int]:
    limit = _FREE_SHARE * float(flops.sum())
    from_batch, from_params = set(parts.batch), set(variables(parts.wrt))
    placed: set[Any] = set()
    free = set()
    for i, eqn in enumerate(parts.loop):
        read = variables(eqn.invars)
        batch, params = not from_batch.isdisjoint(read), not from_params.isdisjoint(read)
        if batch:
            from_batch.update(eqn.outvars)
        if params:
            from_params.update(eqn.outvars)
        light = flops[i] <= limit and not is_matmul(eqn.primitive.name)
        cheap = not batch or (not params and light)
        if cheap and eqn.primitive is not layer_mark_p and placed.isdisjoint(read):
            free.add(i)
        else:
            placed.update(eqn.outvars)
    return free


def _clustered(
    parts: StepParts, placed: Sequence[int], flops: np.ndarray, layer_num: int | Literal["auto"],
    notes: list[str],
) -> Sequence[int]:  # fmt: skip
    """Cut positions in `placed`."""
    at = {i: n for n, i in enumerate(placed)}
    made = {v: n for i, n in at.items() for v in parts.loop[i].outvars}
    last = dict(made)
    for i, n in at.items():
        for v in variables(parts.loop[i].invars):
            if v in made:
                last[v] = n
    values = list(made)
    crossing = crossing_bytes(
        np.array([made[v] for v in values]), np.array([last[v] for v in values]),
        np.array([aval_bytes(v.aval) for v in values]), len(placed),
    )  # fmt: skip
    # Exact sums of bytes are not worth an error: large ones are counted in larger units.
    crossing = crossing // max(1, int(crossing.max(initial=0)) >> _BYTES_BITS)
    here = flops[list(placed)]
    if not np.any(here):
        here = np.ones(len(placed))
    try:
        found = cluster_layers(
            here, crossing, _scope_boundaries(parts, placed), layer_num=layer_num
        )
    except ValueError as error:
        raise StepError(f"the loss function cannot be cut into layers: {error}") from None
    if found.relaxed:
        notes.append(
            f"layers differ by up to {found.delta:.0%} of their mean FLOPs: the forward pass "
            f"cannot be cut into {found.num_layers} layers more evenly"
        )
    return found.cuts


def _scope_boundaries(parts: StepParts, placed: Sequence[int]) -> np.ndarray | None:
    """Where one block of the model ends: a change of module scope, or of a repeated run."""
    scopes = [
        tuple(s for s in compat.scope_name(parts.loop[i].source_info).split("/") if s)
        for i in placed
    ]
    depth = _block_depth(scopes)
    boundary = np.zeros(len(placed) + 1, dtype=bool)
    boundary[[0, -1]] = True
    if depth:
        names = [scope[:depth] for scope in scopes]
        # Equations without a scope (residual additions) belong to the block before.
        for i in range(1, len(names)):
            if len(names[i]) < depth and names[i] == names[i - 1][: len(names[i])]:
                names[i] = names[i - 1]
            boundary[i] = names[i] != names[i - 1]
        return boundary
    period, start = _repeated_run([equation_key(parts.loop[i]) for i in placed])
    if not period:
        return None
    keys = [equation_key(parts.loop[i]) for i in placed]
    for i in range(start, len(placed) + 1, period):
        boundary[i] = True
        if i + period > len(placed) or keys[i : i + period] != keys[start : start + period]:
            break
    return boundary


def _block_depth(scopes: Sequence[tuple[str, ...]]) -> int:
    """The depth of module scopes at which blocks stand side by side; 0 if there are none."""
    for depth in range(1, max(map(len, scopes), default=0) + 1):
        if len({s[:depth] for s in scopes if len(s) >= depth}) > 1:
            return depth
    return 0


def _repeated_run(keys: Sequence[str]) -> tuple[int, int]:
    """(period, start) of the longest run of repeats that covers half of the equations."""
    numbers = np.unique(np.array(keys), return_inverse=True)[1] if keys else np.zeros(0)
    total = len(numbers)
    best = (0, 0, 0)
    for period in range(2, total // 2 + 1):
        same = np.concatenate([[False], numbers[period:] == numbers[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        lengths = edges[1::2] - edges[::2]
        if not lengths.size:
            continue
        longest = int(np.argmax(lengths))
        covered = int(lengths[longest]) + period
        if covered >= 2 * period and covered > best[0] + period / 2:
            best = (covered, period, int(edges[::2][longest]))
    return best[1:] if 2 * best[0] >= total else (0, 0)


def _layer_key(parts: StepParts, positions: Sequence[int]) -> str:
    """Text of a layer: its equations and how they are connected."""
    numbers: dict[Any, int] = {}
    lines = []
    for i in positions:
        eqn = parts.loop[i]
        read = [
            "lit" + str(a) if compat.is_literal(a) else f"{numbers.setdefault(a, len(numbers))}"
            for a in eqn.invars
        ]
        for v in eqn.outvars:
            numbers[v] = len(numbers)
        lines.append(f"{equation_key(eqn)}({','.join(read)})")
    return "\n".join(lines)


def equation_key(eqn: Any) -> str:
    shapes = ",".join(f"{a.aval.dtype}{list(a.aval.shape)}" for a in (*eqn.invars, *eqn.outvars))
    params = ",".join(f"{k}={param_key(v)}" for k, v in sorted(eqn.params.items()))
    return f"{eqn.primitive.name}[{params}]{shapes}"


__all__ = ["LayerGraph", "build_layers", "jaxpr_equation_flops"]
