"""Which logical meshes to try, and what to call their axes once it is known what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import PlanError
from alpa_lite.ir.graph import Literal
from alpa_lite.ir.sharding import MAX_MESH_AXES, Mesh
from alpa_lite.passes.decision_graph import Contraction
from alpa_lite.passes.methods import Method, batch_factors
from alpa_lite.passes.strategies import Assignment

_NAMES = {
    (True, False): "dp",
    (True, True): "fsdp",
    (False, True): "tp",
    (False, False): "sp",
}
_NEUTRAL = ("x0", "x1", "x2", "x3")


def candidate_meshes(method: Method, cluster: Cluster) -> list[Mesh]:
    """Meshes a method is planned on.

    Without a prescribed shape, a search tries one axis over all devices and every split into two;
    the inner axis is no larger than a host, unless it is all there is. More axes are not searched:
    docs/design/001-spine.md says why.

    Raises:
      PlanError: the prescribed shape does not multiply to the number of devices.
    """
    total = cluster.num_devices
    if method.mesh_shape is not None:
        return [_prescribed(method.mesh_shape, total)]
    meshes = [Mesh(((_NEUTRAL[0], total),))]
    if method.searches_mesh():
        for inner in range(2, min(total, cluster.devices_per_host + 1)):
            outer = total // inner
            # Within one host all links are alike, so 2x4 and 4x2 are the same problem.
            mirrored = cluster.num_hosts == 1 and inner < outer
            if total % inner == 0 and cluster.devices_per_host % inner == 0 and not mirrored:
                meshes.append(Mesh(((_NEUTRAL[0], outer), (_NEUTRAL[1], inner))))
    return meshes


def search_notes(method: Method, cluster: Cluster) -> tuple[str, ...]:
    """What the search left out: a note for the plan, where the devices make three axes."""
    if method.mesh_shape is not None or not method.searches_mesh():
        return ()
    rest, factors = cluster.num_devices, 0
    for divisor in range(2, rest + 1):
        while rest % divisor == 0:
            rest, factors = rest // divisor, factors + 1
    if factors < 3:
        return ()
    return (f"meshes of one and two axes were searched; mesh_shape takes up to {MAX_MESH_AXES}",)


def _prescribed(shape: Sequence[int] | Mapping[str, int], total: int) -> Mesh:
    if isinstance(shape, Mapping):
        names, sizes = tuple(shape), list(shape.values())
    else:
        names, sizes = _NEUTRAL[: len(shape)], list(shape)
    if any(not isinstance(s, int) or s < -1 or s == 0 for s in sizes) or sizes.count(-1) > 1:
        raise PlanError(
            f"mesh_shape {shape!r}: sizes must be positive integers, with at most one -1 (the rest)"
        )
    known = 1
    for size in sizes:
        known *= size if size > 0 else 1
    sizes = [size if size > 0 else total // known for size in sizes]
    mesh = Mesh(tuple(zip(names, sizes, strict=True))) if all(s > 0 for s in sizes) else None
    if mesh is None or mesh.num_devices != total:
        raise PlanError(
            f"mesh_shape {shape!r} makes {known} devices but the cluster has {total}; axis sizes "
            f"must multiply to {total}"
        )
    return mesh


def name_axes(contraction: Contraction, mesh: Mesh, assignments: Sequence[Assignment]) -> Mesh:
    """Give searched axes the field's names, by what they mostly do.

    =========  =============================  ==========================
    name       most FLOPs split on the batch  most parameter bytes split
    =========  =============================  ==========================
    `dp`       yes                            no
    `fsdp`     yes                            yes
    `tp`       no                             yes
    `sp`       no                             no
    =========  =============================  ==========================
    """
    if not set(mesh.names) <= set(_NEUTRAL):
        return mesh
    batch = batch_factors(contraction)
    names: list[str] = []
    for axis in range(len(mesh.axes)):
        splits_batch = _flops_share(contraction, assignments, axis, batch) >= 0.5
        splits_params = _params_share(contraction, assignments, axis) >= 0.5
        base = _NAMES[splits_batch, splits_params]
        taken = sum(n.rstrip("0123456789") == base for n in names)
        names.append(base if not taken else f"{base}{taken + 1}")
    return Mesh(tuple(zip(names, mesh.shape, strict=True)))


def _flops_share(
    c: Contraction, assignments: Sequence[Assignment], axis: int, batch: Sequence[frozenset[int]]
) -> float:
    """Share of the FLOPs of ops with a batch dim whose batch dim the axis splits."""
    total = hit = 0.0
    for op in c.ops:
        node = c.node_of[op.id]
        if op.op is None or op.kind != "op" or not batch[node]:
            continue
        flops = op.weight * op.op.flops
        total += flops
        hit += flops * (assignments[node][axis] in batch[node])
    return hit / total if total else 0.0


def _params_share(c: Contraction, assignments: Sequence[Assignment], axis: int) -> float:
    graph = c.program.graph
    params = {p for r in graph.grad_regions for p in r.params if not isinstance(p, Literal)}
    total = hit = 0.0
    for param in params:
        value = c.program.value_at[(), param]
        op = c.ops[c.definition[value]]
        if not op.results or op.kind not in ("state", "argument"):
            continue
        chosen = assignments[c.node_of[op.id]][axis]
        size = c.values[value].num_bytes
        total += size
        hit += size * (chosen >= 0 and chosen in c.result_layouts[op.id][0].dims)
    return hit / total if total else 0.0
