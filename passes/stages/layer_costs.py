"""What layers cost on every submesh: `LayerPricer`.

Every layer is cut off as a stage of its own and planned by the passes that plan stages, once per
kind of layer and logical mesh. A stage costs about the sum of its layers: what is left out are
layout changes between layers, which alike layers do not need. So the figures serve to propose
stages; what is proposed is planned whole.

Rematerialisation is priced without planning again: layouts are kept, the backward pass is longer by
what it computes again on one device, and the share of the stashed bytes that is kept is that of
the unsharded ones. So are other numbers of microbatches: the same layouts are priced for the whole
batch as one, and what lies between is interpolated (`stage_tables.costs_at`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from alpa_lite.cost_model import Cluster, MeshCostModel
from alpa_lite.errors import InfeasibleError, SolverTimeoutError
from alpa_lite.ir.graph import BACKWARD, FORWARD
from alpa_lite.ir.sharding import Mesh
from alpa_lite.passes.build import PlanningInputs, class_strategies, solve_on_mesh
from alpa_lite.passes.decisions import Decisions, decide
from alpa_lite.passes.inter_op import Submesh
from alpa_lite.passes.memory import MemoryProfile, profile_memory, stashed_values
from alpa_lite.passes.pipeline_methods import NO_REMAT, PipeshardParallel
from alpa_lite.passes.pricing import Workload, compute_s, count_work
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.plan_stage import stage_inputs, subcluster
from alpa_lite.passes.stages.search_space import mesh_shapes
from alpa_lite.passes.stages.source import CutStep, LayeredStep, cut_step
from alpa_lite.passes.stages.stage_cost import phase_work, stage_cost

# The share of a device's memory that the state may take before layouts with less of it are looked
# for; the rest is for activations.
_STATE_SHARE = 0.6

# State within this factor of the smallest possible, split over all devices, is not made smaller.
_LEAST_STATE = 1.25

# Seconds for a search for layouts with less state: what it has found by then will do.
_LEAN_S = 0.5

# Relative distance to the optimum that is good enough.
_GAP = 0.005

# Of the logical meshes of a submesh, on how many all kinds of layers are priced: on those that are
# best for the kind that matters most.
_GOOD_OPTIONS = 2

# Kinds with a smaller share of all operations take from the main kind what rematerialisation costs.
_OWN_SHARE = 0.15

_ONE_DEVICE = Mesh((("x0", 1),))


@dataclass(frozen=True, slots=True)
class LayerOption:
    """One way to lay out layers on a submesh.

    Attributes:
      mesh_shape: of the logical mesh.
      is_lean: whether the state is made small, at the price of time.
    """

    mesh_shape: tuple[int, ...]
    is_lean: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """One layer on one submesh: seconds, and bytes per device.

    Attributes:
      forward_s, backward_s: of one microbatch.
      per_step_s: once per step.
      state_bytes: there all the time: parameters, optimizer state, sums of gradients.
      temporary_bytes: there while the layer runs.
      stash_bytes: what each microbatch in flight keeps for its backward pass.
      input_bytes: the part of it that came in.
    """

    forward_s: float
    backward_s: float
    per_step_s: float
    state_bytes: float
    temporary_bytes: float
    stash_bytes: float
    input_bytes: float


@dataclass(frozen=True, slots=True)
class RematCost:
    """What a rematerialisation policy changes.

    Attributes:
      backward: seconds of the backward pass, relative to no rematerialisation.
      kept: stashed bytes that did not come in, relative to no rematerialisation.
    """

    backward: float
    kept: float


Cells = tuple[tuple[tuple[LayerCost | None, ...], ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class LayerCosts:
    """All that was priced, for one number of microbatches.

    Attributes:
      num_microbatches: the number.
      kinds: per layer, its kind.
      submeshes: those priced.
      options: per submesh, ways to lay layers out.
      costs: `costs[kind][submesh][option]`; None where the layer does not fit.
      whole: the same layouts with the whole batch as one microbatch, whether that fits or not; None
        where it is not known.
      remat: per kind and policy.
      guesses: (submesh, option) of lean options that are as fast as others until they are priced.
    """

    num_microbatches: int
    kinds: tuple[int, ...]
    submeshes: tuple[Submesh, ...]
    options: tuple[tuple[LayerOption, ...], ...]
    costs: Cells
    whole: Cells
    remat: tuple[dict[str, RematCost], ...]
    guesses: frozenset[tuple[int, int]]


class LayerPricer:
    """Prices the layers of a step at one number of microbatches, submesh by submesh.

    Lean options are priced when asked for: until then they are taken to be as fast as others and
    to have the least state there can be, so that a search which does not choose them needs not
    know them better.

    Attributes:
      kinds: per layer, its kind: alike layers have the same.
      main: the kind that has most operations.
    """

    def __init__(
        self, source: LayeredStep, method: PipeshardParallel, cluster: Cluster, table: RuleTable,
        remats: Sequence[str], whole: LayeredStep | None = None,
    ) -> None:  # fmt: skip
        """Finds the kinds of layers and makes their decision graphs.

        Args:
          source: the step.
          method: restrictions of the layouts.
          cluster: the hardware.
          table: sharding rules found so far.
          remats: policies to price.
          whole: the step with the whole batch as one microbatch and the same layers, if other
            numbers of microbatches are of interest.
        """
        self.source, self.method, self.cluster, self.table = source, method, cluster, table
        self.cut: CutStep = cut_step(source, [[i] for i in range(source.graph.num_layers)])
        self.kinds = self._find_kinds()
        every = range(max(self.kinds) + 1)
        self.inputs = [self._inputs_of(kind, NO_REMAT, self.cut) for kind in every]
        self.work = [phase_work(each) for each in self.inputs]
        self.state_bytes = [
            sum(each.contraction.values[v].num_bytes for v in _state(each)) for each in self.inputs
        ]
        shares = self._shares()
        self.main = max(every, key=shares.__getitem__)
        own = {
            kind: self._remat_costs(kind, remats)
            for kind in every
            if shares[kind] >= _OWN_SHARE or kind == self.main
        }
        self.remat = tuple(own.get(kind, own[self.main]) for kind in every)
        self.whole: list[PlanningInputs | None] = [None for _ in every]
        if whole is not None:
            cut = cut_step(whole, [[i] for i in range(whole.graph.num_layers)])
            found = [self._inputs_of(kind, NO_REMAT, cut) for kind in every]
            self.whole = [
                b if _same_nodes(a, b) else None for a, b in zip(self.inputs, found, strict=True)
            ]
        self.whole_work = [None if each is None else phase_work(each) for each in self.whole]
        self.submeshes: list[Submesh] = []
        self.options: list[tuple[LayerOption, ...]] = []
        self.cells: list[list[list[_Cell | None]]] = [[] for _ in every]
        self.guesses: set[tuple[int, int]] = set()

    def costs(self) -> LayerCosts:
        """All that has been priced."""

        def cells(pick: Callable[[_Cell], LayerCost | None]) -> Cells:
            return tuple(
                tuple(tuple(None if c is None else pick(c) for c in row) for row in kind)
                for kind in self.cells
            )

        return LayerCosts(
            self.source.num_microbatches, self.kinds, tuple(self.submeshes), tuple(self.options),
            cells(lambda c: c.cost), cells(lambda c: c.whole), self.remat, frozenset(self.guesses),
        )  # fmt: skip

    def price(self, submesh: Submesh, deadline_s: float) -> bool:
        """Price all kinds on a submesh; False, and nothing is priced, at the deadline.

        Args:
          submesh: its shape.
          deadline_s: of `time.monotonic()`.
        """
        shapes = mesh_shapes(self.method, self.cluster, submesh)
        found: dict[int, list[_Cell | None]] = {}
        guesses = set()
        main = self.main
        for kind in sorted(range(len(self.inputs)), key=lambda each: each != main):
            row: list[_Cell | None] = []
            for shape in shapes:
                if time.monotonic() > deadline_s:
                    return False
                if kind != main and not _is_good(found[main], len(row)):
                    row += (None, None)
                    continue
                fast = lean = self._fast(kind, submesh, shape)
                if fast is not None and self._is_large(kind, fast.cost, submesh):
                    guesses.add((len(self.submeshes), len(row) + 1))
                    least = self.state_bytes[kind] / submesh.num_devices
                    lean = replace(fast, cost=replace(fast.cost, state_bytes=least))
                row += (fast, lean)
            found[kind] = row
        for kind, row in found.items():
            self.cells[kind].append(row)
        self.guesses |= guesses
        self.submeshes.append(submesh)
        self.options.append(tuple(LayerOption(s, lean) for s in shapes for lean in (False, True)))
        return True

    def price_lean(self, index: int, option: int) -> None:
        """Price a lean option that was guessed.

        Args:
          index: of the submesh in `costs().submeshes`.
          option: of it.
        """
        self.guesses.discard((index, option))
        submesh = self.submeshes[index]
        shape = self.options[index][option].mesh_shape
        for kind, cells in enumerate(self.cells):
            fast = cells[index][option - 1]
            if fast is not None and self._is_large(kind, fast.cost, submesh):
                cells[index][option] = self._lean(kind, submesh, shape, fast.cost)

    def _shares(self) -> dict[int, float]:
        """The share of all operations that each kind has."""
        shares = dict.fromkeys(self.kinds, 0.0)
        total = sum(self.source.graph.flops)
        for kind, flops in zip(self.kinds, self.source.graph.flops, strict=True):
            shares[kind] += flops / total if total else 0.0
        return shares

    def _find_kinds(self) -> tuple[int, ...]:
        """Equal numbers for layers with the same equations and the same state."""
        state: dict[int, list[str]] = {}
        for position, home in enumerate(self.cut.split.input_homes):
            if home is not None:
                aval = self.source.parts.inputs[position].aval
                state.setdefault(home, []).append(f"{aval.dtype}{aval.shape}")
        keys = [
            (key, tuple(sorted(state.get(layer, ()))))
            for layer, key in enumerate(self.source.graph.keys)
        ]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return tuple(numbers[key] for key in keys)

    def _inputs_of(self, kind: int, remat: str, cut: CutStep) -> PlanningInputs:
        """The decision graph of a kind, from a layer in the middle of those that have it."""
        where = [layer for layer, each in enumerate(self.kinds) if each == kind]
        step = cut.stage(where[len(where) // 2], remat)
        count = cut.source.num_microbatches
        if cut is not self.cut:
            count = 2  # so that what is done once per step can be told from what is done each time
        several = self.source.num_microbatches > 1
        return stage_inputs(step, count, self.method, self.cluster, self.table, folds_keys=several)

    def _remat_costs(self, kind: int, remats: Sequence[str]) -> dict[str, RematCost]:
        """What the policies change."""
        whole_s, own_bytes = _unsharded(self.inputs[kind])
        found = {NO_REMAT: RematCost(1.0, 1.0)}
        for name in remats:
            if name != NO_REMAT:
                again_s, kept_bytes = _unsharded(self._inputs_of(kind, name, self.cut))
                found[name] = RematCost(
                    again_s / whole_s if whole_s else 1.0,
                    min(1.0, kept_bytes / own_bytes) if own_bytes else 1.0,
                )
        return found

    def _fast(self, kind: int, submesh: Submesh, shape: Sequence[int]) -> _Cell | None:
        """A layer as fast as can be; None if it does not fit."""
        return self._solved(
            kind, submesh, shape, self.method.memory_budget_bytes, self.method.time_limit_s
        )

    def _lean(
        self, kind: int, submesh: Submesh, shape: Sequence[int], fast: LayerCost
    ) -> _Cell | None:
        """A layer with little state; None if there are no such layouts, or none were found soon."""
        room = max(self._room_bytes(kind, submesh), self._least_bytes(kind, submesh))
        budget = room + fast.temporary_bytes + fast.stash_bytes
        return self._solved(kind, submesh, shape, budget, min(_LEAN_S, self.method.time_limit_s))

    def _is_large(self, kind: int, fast: LayerCost, submesh: Submesh) -> bool:
        """Whether the state is so large that layouts with less of it are worth a look."""
        return fast.state_bytes > max(
            self._room_bytes(kind, submesh), self._least_bytes(kind, submesh)
        )

    def _least_bytes(self, kind: int, submesh: Submesh) -> float:
        return _LEAST_STATE * self.state_bytes[kind] / submesh.num_devices

    def _room_bytes(self, kind: int, submesh: Submesh) -> float:
        """State that each layer may have in a stage with its share of the layers."""
        flops = self.source.graph.flops
        own = max(f for f, k in zip(flops, self.kinds, strict=True) if k == kind)
        share = submesh.num_devices / self.cluster.num_devices
        many = max(1.0, share * sum(flops) / own) if own else 1.0
        return _STATE_SHARE * self.inputs[kind].budget_bytes / many

    def _solved(
        self, kind: int, submesh: Submesh, shape: Sequence[int], budget_bytes: float | None,
        time_limit_s: float,
    ) -> _Cell | None:  # fmt: skip
        part = subcluster(self.cluster, submesh.num_hosts, submesh.devices_per_host)
        inputs = self.inputs[kind]
        method = replace(inputs.method, memory_budget_bytes=budget_bytes)
        inputs = replace(inputs, cluster=part, method=method)
        mesh = Mesh(tuple((f"x{i}", n) for i, n in enumerate(shape)))
        try:
            found = solve_on_mesh(inputs, mesh, time_limit_s, _GAP)
        except (InfeasibleError, SolverTimeoutError):
            return None
        d = found.decisions
        cost = _layer_cost(inputs, d, found.profile, self.work[kind])
        at_once = self.whole[kind]
        if at_once is None:
            return _Cell(cost, None)
        at_once = replace(at_once, cluster=part)
        c = at_once.contraction
        d = decide(c, mesh, d.assignments)
        profile = profile_memory(c, at_once.liveness, mesh, d.result_specs, d.operand_specs)
        return _Cell(cost, _layer_cost(at_once, d, profile, self.whole_work[kind]))


@dataclass(frozen=True, slots=True)
class _Cell:
    """A layer as it is, and with the whole batch as one microbatch."""

    cost: LayerCost
    whole: LayerCost | None


def _is_good(row: Sequence[_Cell | None], option: int) -> bool:
    """Whether few options of a kind are faster than this one: other kinds are priced for those."""

    def seconds(cell: _Cell | None) -> float:
        return math.inf if cell is None else cell.cost.forward_s + cell.cost.backward_s

    faster = sum(seconds(cell) < seconds(row[option]) for cell in row[::2])
    return faster < _GOOD_OPTIONS


def _same_nodes(a: PlanningInputs, b: PlanningInputs) -> bool:
    """Whether the layouts of one are layouts of the other."""
    pairs = zip(a.contraction.nodes, b.contraction.nodes, strict=False)
    return len(a.contraction.nodes) == len(b.contraction.nodes) and all(
        x.name == y.name for x, y in pairs
    )


def _layer_cost(
    inputs: PlanningInputs, decisions: Decisions, profile: MemoryProfile,
    work: Mapping[str, Workload] | None,
) -> LayerCost:  # fmt: skip
    cost = stage_cost(inputs, decisions, profile, 1, work)
    state = _bytes_per_device(inputs, decisions, _state(inputs))
    came_in = _bytes_per_device(inputs, decisions, _incoming(inputs))
    return LayerCost(
        forward_s=cost.forward_s, backward_s=cost.backward_s, per_step_s=cost.per_step_s,
        state_bytes=state, temporary_bytes=max(0.0, cost.resident_bytes - state),
        stash_bytes=cost.stash_bytes, input_bytes=min(cost.stash_bytes, came_in),
    )  # fmt: skip


def _state(inputs: PlanningInputs) -> list[int]:
    """What is there during the whole loop, what came in left out."""
    c, live = inputs.contraction, inputs.liveness
    first, last = live.loop
    return [
        value
        for value in range(len(c.values))
        if live.start[value] <= first
        and live.end[value] >= last
        and c.ops[c.definition[value]].kind != "batch"
    ]


def _bytes_per_device(inputs: PlanningInputs, d: Decisions, values: Iterable[int]) -> float:
    return sum(
        inputs.contraction.values[i].num_bytes / d.value_spec(i).num_shards(d.mesh) for i in values
    )


def _incoming(inputs: PlanningInputs) -> set[int]:
    """What comes in per microbatch and is read by the forward pass."""
    c = inputs.contraction
    return {
        value
        for op in c.ops
        if op.phase == FORWARD
        for value in c.operands[op.id]
        if c.ops[c.definition[value]].kind == "batch"
    }


def _unsharded(inputs: PlanningInputs) -> tuple[float, float]:
    """Seconds of the backward pass on one device, and stashed bytes that did not come in."""
    c = inputs.contraction
    prices = MeshCostModel(subcluster(inputs.cluster, 1, 1), _ONE_DEVICE.axes)
    only = class_strategies(c, inputs.classes, _ONE_DEVICE)
    seconds = compute_s(count_work(c, inputs.classes, BACKWARD), only, _ONE_DEVICE, prices)
    own = stashed_values(c) - _incoming(inputs)
    return seconds, float(sum(c.values[v].num_bytes for v in own))
