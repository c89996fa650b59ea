"""Parallel methods: the same search with some strategies forbidden.

In: the decision graph and its strategies on one mesh. Out: for every class a mask of allowed
strategies. `AutoParallel` forbids nothing; the fixed methods leave the integer program only what
they do not prescribe, so all of them are priced, planned and run by the same code.
"""

from __future__ import annotations

import fnmatch
import reprlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jax.sharding import PartitionSpec

from alpa_lite.errors import InfeasibleError, PlanError
from alpa_lite.ir.graph import UPDATE
from alpa_lite.ir.sharding import MAX_MESH_AXES, Mesh, ShardingSpec
from alpa_lite.passes.decision_graph import NONE, Contraction, Node
from alpa_lite.passes.strategies import PARTIAL, Assignment, StrategySet, layout_spec

MeshShape = Sequence[int] | Mapping[str, int]


_HUGE = 1e18  # a million terabytes, or longer than the universe is old


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods.

    Attributes:
      num_microbatches: gradient accumulation steps; `"auto"` takes the fewest that fit.
      memory_budget_bytes: per device; the cluster's usable memory by default.
      mesh_shape: sizes of the logical mesh's axes, slowest links first (at most four), or a
        mapping from axis names; searched if None.
      time_limit_s: for the integer programs of one plan, together; tracing does not count.
      solver: `"highs"`, or another MILP solver that PuLP finds.
    """

    num_microbatches: int | Literal["auto"] = "auto"
    memory_budget_bytes: float | None = None
    mesh_shape: MeshShape | None = None
    time_limit_s: float = 60.0
    solver: str = "highs"

    def __post_init__(self) -> None:
        count = self.num_microbatches
        if count != "auto" and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ValueError(
                f'num_microbatches must be a positive integer or "auto", found {count!r}'
            )
        for name in ("memory_budget_bytes", "time_limit_s"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < _HUGE) and not (
                value is None and name == "memory_budget_bytes"
            ):
                found = reprlib.repr(value)
                raise ValueError(f"{name} must be a positive number below {_HUGE:g}, found {found}")
        if self.mesh_shape is not None:
            _check_mesh_shape(self.mesh_shape)

    @property
    def label(self) -> str:
        """Name and the options that differ from the defaults."""
        shown = [
            f"{name}={getattr(self, name)!r}"
            for name, spec in type(self).__dataclass_fields__.items()
            if getattr(self, name) != spec.default and name != "specs"
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def searches_mesh(self) -> bool:
        """Whether mesh shapes with several axes are tried."""
        return False

    def pins(self, contraction: Contraction) -> dict[str, PartitionSpec]:
        """Prescribed layout by input path."""
        return {}

    def allowed(
        self, contraction: Contraction, classes: Sequence[int], strategies: Sequence[StrategySet],
        mesh: Mesh,
    ) -> list[np.ndarray]:  # fmt: skip
        """Mask `[num_strategies]` per class."""
        return [np.ones(len(s), dtype=bool) for s in strategies]


@dataclass(frozen=True, kw_only=True)
class AutoParallel(Method):
    """Everything is searched: mesh shape, all layouts, and microbatches if memory needs them."""

    def searches_mesh(self) -> bool:
        """Several axes are tried."""
        return True


@dataclass(frozen=True, kw_only=True)
class ShardParallel(Method):
    """All layouts are searched on one mesh: `mesh_shape`, or one axis over all devices."""


@dataclass(frozen=True, kw_only=True)
class ManualParallel(Method):
    """Some layouts are given, the rest is searched.

    Attributes:
      specs: path pattern of inputs (`"state.params.*.kernel"`, shell wildcards) ->
        `PartitionSpec`. Later patterns win. Axis names are those of `mesh_shape`.
    """

    specs: Mapping[str, PartitionSpec] = field(default_factory=dict)

    def __init__(self, specs: Mapping[str, PartitionSpec] | None = None, **options: Any) -> None:
        if not (specs is None or isinstance(specs, Mapping)) or any(
            not isinstance(pattern, str) for pattern in specs or ()
        ):
            raise TypeError(
                "ManualParallel takes a mapping from path patterns to PartitionSpecs, such as "
                f'{{"state.params.*": P("tp")}}; found {specs!r}'
            )
        object.__setattr__(self, "specs", dict(specs or {}))
        for name, spec in Method.__dataclass_fields__.items():
            object.__setattr__(self, name, options.pop(name, spec.default))
        if options:
            raise TypeError(f"ManualParallel has no option {min(options)!r}")
        self.__post_init__()
        for pattern, pin in self.specs.items():
            if not isinstance(pin, PartitionSpec | tuple | list):
                raise TypeError(f"the pin of {pattern!r} must be a PartitionSpec, found {pin!r}")
        if self.specs and not isinstance(self.mesh_shape, Mapping):
            raise ValueError(
                "ManualParallel specs name mesh axes, so mesh_shape must be a mapping such as "
                f"{{'dp': 2, 'tp': 4}}; found {self.mesh_shape!r}"
            )

    def allowed(
        self, contraction: Contraction, classes: Sequence[int], strategies: Sequence[StrategySet],
        mesh: Mesh,
    ) -> list[np.ndarray]:  # fmt: skip
        """The strategies that agree with the pins."""
        masks = super().allowed(contraction, classes, strategies, mesh)
        links = contraction.input_links()
        for name, pin in self.pins(contraction).items():
            op_id = links[name]
            shape = contraction.values[contraction.ops[op_id].results[0]].shape
            spec = parse_partition_spec(pin, shape, mesh, name)
            cls = classes[contraction.node_of[op_id]]
            layout = contraction.result_layouts[op_id][0]
            fits = np.array(
                [layout_spec(layout, a, mesh.names) == spec for a in strategies[cls].assignments]
            )
            if not (masks[cls] & fits).any():
                raise PlanError(
                    f"no strategy gives {name} {shape} the spec {spec} on mesh {mesh}: every dim "
                    "must divide by the axes on it, and inputs that one update reads together "
                    "share a layout. Change the pin or the mesh."
                )
            masks[cls] &= fits
        return masks

    def pins(self, contraction: Contraction) -> dict[str, PartitionSpec]:
        """Spec per pinned input; later patterns win."""
        pinned: dict[str, PartitionSpec] = {}
        links = contraction.input_links()
        for pattern, spec in self.specs.items():
            hits = [n for n in links if fnmatch.fnmatchcase(n, pattern)]
            if not hits:
                shown = ", ".join(list(links)[:8]) + (", ..." if len(links) > 8 else "")
                raise PlanError(f"the pin {pattern!r} matches no input; inputs are {shown}")
            pinned.update(dict.fromkeys(hits, spec))
        return pinned


@dataclass(frozen=True, kw_only=True)
class DataParallel(Method):
    """The batch is split over all devices; parameters and optimizer state are replicated."""

    shard_state: bool = field(default=False, init=False, repr=False)
    shard_gradients: bool = field(default=False, init=False, repr=False)
    shard_params: bool = field(default=False, init=False, repr=False)

    def allowed(
        self, contraction: Contraction, classes: Sequence[int], strategies: Sequence[StrategySet],
        mesh: Mesh,
    ) -> list[np.ndarray]:  # fmt: skip
        """The strategies that split the batch, and of the state what the level prescribes.

        Raises:
          InfeasibleError: no batch leaf can be split over all devices.
        """
        self._require_divisible_batch(contraction, mesh)
        batch = batch_factors(contraction)
        masks: list[np.ndarray | None] = [None] * len(strategies)
        for node in contraction.nodes:
            cls = classes[node.id]
            if masks[cls] is None:
                wanted = self._wanted(contraction, node, batch[node.id])
                masks[cls] = _prefer(strategies[cls], mesh, *wanted)
        return [m for m in masks if m is not None]

    def _require_divisible_batch(self, contraction: Contraction, mesh: Mesh) -> None:
        """Devices that get no part of the batch would repeat each other's work."""
        c = contraction
        count = c.program.microbatching.num_microbatches
        leaves = [c.values[op.results[0]] for op in c.ops if op.kind == "batch"]
        arrays = {leaf.name: leaf.shape for leaf in leaves if leaf.shape}
        # Microbatches that memory asks for may be smaller than that.
        times = count if self.num_microbatches == "auto" else 1
        if arrays and all(times * n % mesh.num_devices for n, *_ in arrays.values()):
            name, (n, *rest) = next(iter(arrays.items()))
            what = f"one of {count} microbatches of {name}" if count > times else name
            raise InfeasibleError(
                f"{type(self).__name__} splits the batch over all {mesh.num_devices} devices, but "
                f"dim 0 of {what} {(times * n, *rest)} is not divisible by {mesh.num_devices}. "
                "Change the batch size, use fewer microbatches, or use AutoParallel(), which can "
                "split other dims."
            )

    def _wanted(
        self, contraction: Contraction, node: Node, batch: frozenset[int]
    ) -> tuple[frozenset[int], bool]:
        """(factors that axes must be spent on, whether pending sums are allowed)."""
        if batch:
            return batch, False
        every = frozenset(range(len(node.factors)))
        kinds = {contraction.ops[o].kind for o in node.ops}
        updates = all(contraction.ops[o].phase == UPDATE for o in node.ops)
        is_param = "state" in kinds and _read_by_model(contraction, node)
        if "gradient" in kinds:
            return (every, True) if self.shard_gradients else (frozenset(), True)
        if is_param:
            return (every, False) if self.shard_params else (frozenset(), False)
        if updates and "batch" not in kinds and "argument" not in kinds:
            return (every, False) if self.shard_state else (frozenset(), False)
        return frozenset(), node.can_be_partial


@dataclass(frozen=True, kw_only=True)
class Zero1Parallel(DataParallel):
    """Data parallel with the optimizer state split over the devices."""

    shard_state: bool = field(default=True, init=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Zero2Parallel(Zero1Parallel):
    """Data parallel with optimizer state and gradients split over the devices."""

    shard_gradients: bool = field(default=True, init=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Zero3Parallel(Zero2Parallel):
    """Data parallel with optimizer state, gradients and parameters split (FSDP)."""

    shard_params: bool = field(default=True, init=False, repr=False)


def _check_mesh_shape(shape: Any) -> None:
    if isinstance(shape, str) or not isinstance(shape, Sequence | Mapping):
        raise ValueError(
            "mesh_shape must be a sequence of sizes, or a mapping from axis names to sizes, found "
            f"{shape!r}"
        )
    if not 1 <= len(shape) <= MAX_MESH_AXES:
        raise ValueError(f"mesh_shape must have 1 to {MAX_MESH_AXES} axes, found {shape!r}")
    sizes = shape.values() if isinstance(shape, Mapping) else shape
    if any(
        not isinstance(n, int | np.integer) or isinstance(n, bool) or n == 0 or n < -1
        for n in sizes
    ):
        raise ValueError(
            f"mesh_shape {shape!r}: sizes must be positive integers, or -1 for the rest"
        )
    names = list(shape) if isinstance(shape, Mapping) else []
    if not all(isinstance(n, str) and n.isidentifier() for n in names):
        raise ValueError(f"mesh_shape {shape!r}: axis names must be identifiers")


def batch_factors(contraction: Contraction, dim: int = 0) -> list[frozenset[int]]:
    """Node factors that stem from one dim of the batch, per node: 0 examples, 1 often tokens."""
    c = contraction
    reads: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for op, position in c.uses:
        value, layout = c.operands[op.id][position], c.operand_layouts[op.id][position]
        producer = c.ops[c.definition[value]]
        made = c.result_layouts[producer.id][producer.results.index(value)]
        for a, b in zip(made.dims, layout.dims, strict=True):
            if a != NONE and b != NONE:
                reads[c.node_of[producer.id], a].add((c.node_of[op.id], b))
    todo = [
        (c.node_of[op.id], c.result_layouts[op.id][0].dims[dim])
        for op in c.ops
        if op.kind == "batch" and len(c.result_layouts[op.id][0].dims) > dim
    ]
    found: list[set[int]] = [set() for _ in c.nodes]
    while todo:
        node, factor = todo.pop()
        if factor != NONE and factor not in found[node]:
            found[node].add(factor)
            todo += reads[node, factor]
    return [frozenset(factors) for factors in found]


def parse_partition_spec(
    spec: PartitionSpec, shape: Sequence[int], mesh: Mesh, name: str
) -> ShardingSpec:
    """Check a user's `PartitionSpec` against an array and a mesh.

    Raises:
      PlanError: more entries than dims, an unknown axis, an axis named twice, axes of a dim in
        another order than the mesh's, or a dim that does not divide.
    """
    if len(spec) > len(shape):
        raise PlanError(f"{spec} has {len(spec)} entries but {name} has {len(shape)} dims")
    dims: list[tuple[str, ...]] = []
    for entry in tuple(spec) + (None,) * (len(shape) - len(spec)):
        if not (entry is None or isinstance(entry, str | tuple)):
            raise PlanError(f"{spec} of {name}: a dim takes None, an axis or a tuple of axes")
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        unknown = [a for a in axes if a not in mesh.names]
        if unknown:
            raise PlanError(f"{spec} of {name} names axis {unknown[0]!r}; the mesh is {mesh}")
        in_order = tuple(sorted(axes, key=mesh.names.index))
        if axes != in_order:
            raise PlanError(
                f"{spec} of {name} splits a dim over mesh axes {axes}; axes of one dim follow the "
                f"order of the mesh, {mesh}. Write {in_order}, or give mesh_shape in another order."
            )
        dims.append(in_order)
    used = [axis for axes in dims for axis in axes]
    if len(set(used)) != len(used):
        raise PlanError(f"{spec} of {name} names a mesh axis twice; each can split one dim")
    for d, axes in enumerate(dims):
        if shape[d] % mesh.size(axes):
            raise PlanError(
                f"dim {d} of {name} {tuple(shape)} is split over mesh axes {axes} of size "
                f"{mesh.size(axes)}, and {mesh.size(axes)} does not divide {shape[d]}. Pad the dim "
                "or choose other axes."
            )
    return ShardingSpec(tuple(dims))


def _prefer(
    strategies: StrategySet, mesh: Mesh, factors: frozenset[int], partial: bool
) -> np.ndarray:
    """Strategies that spend as many devices as possible on the given factors, on nothing else."""

    def spent(assignment: Assignment) -> int:
        return mesh.size(n for n, f in zip(mesh.names, assignment, strict=True) if f in factors)

    def legal(assignment: Assignment) -> bool:
        return all(f in factors or f == NONE or (partial and f == PARTIAL) for f in assignment)

    fits = np.array([legal(a) for a in strategies.assignments])
    shards = np.array(
        [spent(a) if ok else 0 for a, ok in zip(strategies.assignments, fits, strict=True)]
    )
    whole = np.array([PARTIAL in a for a in strategies.assignments])
    return fits & ((shards == shards.max()) | whole)


def _read_by_model(contraction: Contraction, node: Node) -> bool:
    """Whether a state leaf of this node is read by forward or backward."""
    results = {
        r
        for o in node.ops
        if contraction.ops[o].kind == "state"
        for r in contraction.ops[o].results
    }
    return any(
        op.phase != UPDATE and results & set(contraction.operands[op.id]) for op in contraction.ops
    )
