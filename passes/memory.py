"""Bytes alive per device over the step: memory rows before solving, the profile after.

A value occupies memory from the op that makes it to its last reader; the state, donated by the
step, is updated in place. Values that live inside one fusion never reach memory. Values of loop
bodies count once; what a loop reads or carries lives as long as the loop. With several microbatches
the sums of gradients are there from the first one, and each gradient is added when it is made.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from alpa_lite.ir.graph import BACKWARD, FORWARD, Literal
from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.decision_graph import Contraction
from alpa_lite.passes.intra_op import MemoryRow
from alpa_lite.passes.pricing import converted_bytes, internal_values
from alpa_lite.passes.program import FlatOp
from alpa_lite.passes.strategies import StrategySet

PARAMETERS = "parameters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer_state"
ACTIVATIONS = "activations"
TEMPORARIES = "temporaries"
CATEGORIES = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, TEMPORARIES)


_TRANSFORMS = re.compile(r"\w+\(|\)")
"""What JAX's transformations put around module paths: `transpose(jvp(Net))` is `Net`."""


@dataclass(frozen=True, slots=True, eq=False)
class Liveness:
    """When each value is alive, in positions of `times`.

    Attributes:
      order: op ids in order of execution; a time is a position in it.
      start, end: `[num_values]`, inclusive; end < start for values that take no memory.
      category: `[num_values]` index into `CATEGORIES`.
      held: `[num_values]` further copies, of other microbatches in flight, that are there while the
        loop runs (`with_in_flight`).
      loop: first and last time of the loop over microbatches.
    """

    order: tuple[int, ...]
    start: np.ndarray
    end: np.ndarray
    category: np.ndarray
    held: np.ndarray
    loop: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class MemoryProfile:
    """Bytes per device over time under one plan.

    Attributes:
      total_bytes: `[num_times]`.
      peak_time: position of the peak.
      peak_op: id of the op that runs then.
      by_category: bytes at the peak.
      conversion_bytes: `[num_times]` part of the total that holds re-laid-out operands.
    """

    total_bytes: np.ndarray
    peak_time: int
    peak_op: int
    by_category: Mapping[str, float]
    conversion_bytes: np.ndarray

    @property
    def peak_bytes(self) -> float:
        """The largest total."""
        return float(self.total_bytes[self.peak_time])


def analyse_liveness(contraction: Contraction) -> Liveness:
    """Live ranges of all values, whatever their layouts."""
    return _Ranges(contraction).run()


def with_in_flight(contraction: Contraction, liveness: Liveness, in_flight: int) -> Liveness:
    """The same for a pipeline stage that holds several microbatches at once.

    What the backward pass reads of the forward pass, and of what came in, is there `in_flight`
    times.

    Args:
      contraction: of a stage step.
      liveness: of one microbatch at a time.
      in_flight: microbatches between their forward and backward pass, this one included.
    """
    held = np.zeros(len(contraction.values))
    held[list(stashed_values(contraction))] = in_flight - 1
    return replace(liveness, held=held)


def stashed_values(contraction: Contraction) -> set[int]:
    """Values of one microbatch that its forward pass leaves for its backward pass."""
    c = contraction
    outermost = c.program.graph
    last = max((r.last_op for r in outermost.grad_regions), default=0)
    loop = c.program.microbatching.loop_ops or frozenset(range(last))
    found = set()
    for op in c.ops:
        if op.phase != BACKWARD or op.graph is not outermost:
            continue
        for value in c.operands[op.id]:
            maker = c.ops[c.definition[value]]
            inside = maker.op is not None and maker.op.id in loop and maker.graph is outermost
            if maker.kind == "batch" or (inside and maker.phase == FORWARD):
                found.add(value)
    return found


def memory_row(
    contraction: Contraction, liveness: Liveness, time: int, classes: Sequence[int],
    strategies: Sequence[StrategySet], mesh: Mesh,
) -> MemoryRow:  # fmt: skip
    """The linear constraint of one moment: sum over classes of bytes per strategy."""
    alive = np.flatnonzero((liveness.start <= time) & (time <= liveness.end))
    sums: dict[tuple[int, tuple[int, ...]], float] = defaultdict(float)
    c = contraction
    inside = liveness.loop[0] <= time <= liveness.loop[1]
    copies = dict.fromkeys(alive.tolist(), 1.0)
    for value in np.flatnonzero(liveness.held).tolist() if inside else ():
        copies[value] = copies.get(value, 0.0) + float(liveness.held[value])
    for value, count in copies.items():
        producer = c.ops[c.definition[value]]
        layout = c.result_layouts[producer.id][producer.results.index(value)]
        sums[classes[c.node_of[producer.id]], layout.dims] += count * c.values[value].num_bytes
    terms: dict[int, np.ndarray] = {}
    for (cls, dims), num_bytes in sums.items():
        share = num_bytes / strategies[cls].divisors(mesh, dims)
        terms[cls] = terms[cls] + share if cls in terms else share
    op = c.ops[liveness.order[time]]
    return MemoryRow(name=describe_time(op), fixed_bytes=0.0, terms=terms)


def first_times(contraction: Contraction, liveness: Liveness, count: int = 3) -> list[int]:
    """Moments worth a constraint from the start: the unsharded peak of every phase."""
    sizes = np.array([v.num_bytes for v in contraction.values], dtype=np.float64)
    totals = _totals(liveness, sizes)
    phases: dict[str, list[int]] = defaultdict(list)
    for time, op in enumerate(liveness.order):
        phases[contraction.ops[op].phase].append(time)
    peaks = [max(times, key=lambda t: totals[t]) for times in phases.values()]
    return sorted(peaks, key=lambda t: -totals[t])[:count]


def profile_memory(
    contraction: Contraction, liveness: Liveness, mesh: Mesh,
    result_specs: Sequence[Sequence[ShardingSpec]], operand_specs: Sequence[Sequence[ShardingSpec]],
) -> MemoryProfile:  # fmt: skip
    """Exact bytes over time once every spec is chosen, re-laid-out operands included."""
    c = contraction
    specs, sizes = _local_sizes(c, mesh, result_specs)
    liveness = _without_idle_copies(c, liveness, specs)
    totals = _totals(liveness, sizes)
    conversions = np.zeros(len(totals))
    for time, op_id in enumerate(liveness.order):
        op = c.ops[op_id]
        if op.kind in ("state", "gradient", "copy"):
            continue
        for value, target in zip(c.operands[op_id], operand_specs[op_id], strict=True):
            source = specs[value]
            assert source is not None
            if source != target:
                conversions[time] += converted_bytes(
                    source, target, c.values[value].num_bytes, mesh
                )
    totals = totals + conversions
    peak = int(np.argmax(totals))
    held = _held(liveness, sizes, peak)
    shares = {name: float(held[liveness.category == i].sum()) for i, name in enumerate(CATEGORIES)}
    shares[TEMPORARIES] += float(conversions[peak])
    return MemoryProfile(totals, peak, liveness.order[peak], shares, conversions)


def held_bytes(
    contraction: Contraction, liveness: Liveness, mesh: Mesh,
    result_specs: Sequence[Sequence[ShardingSpec]], time: int,
) -> np.ndarray:  # fmt: skip
    """`[num_values]` bytes per device that every value holds at one moment.

    With those of all microbatches in flight, and without re-laid-out operands.
    """
    specs, sizes = _local_sizes(contraction, mesh, result_specs)
    return _held(_without_idle_copies(contraction, liveness, specs), sizes, time)


def memory_curves(
    contraction: Contraction, liveness: Liveness, mesh: Mesh,
    result_specs: Sequence[Sequence[ShardingSpec]], conversion_bytes: np.ndarray,
) -> dict[str, np.ndarray]:  # fmt: skip
    """`[num_times]` bytes per device by category; they add up to `MemoryProfile.total_bytes`.

    Args:
      contraction: the decision graph.
      liveness: when values are alive.
      mesh: the mesh.
      result_specs: chosen layouts.
      conversion_bytes: of the profile; re-laid-out operands are temporaries.
    """
    specs, sizes = _local_sizes(contraction, mesh, result_specs)
    alive = _without_idle_copies(contraction, liveness, specs)
    curves = {
        name: _totals(alive, np.where(alive.category == i, sizes, 0.0))
        for i, name in enumerate(CATEGORIES)
    }
    return curves | {TEMPORARIES: curves[TEMPORARIES] + conversion_bytes}


def describe_time(op: FlatOp) -> str:
    """What a moment is called in messages."""
    scope = "" if op.op is None else _TRANSFORMS.sub("", op.op.scope).strip("/")
    return f"{op.phase}, at {scope or op.name}"


def _local_sizes(
    c: Contraction, mesh: Mesh, result_specs: Sequence[Sequence[ShardingSpec]]
) -> tuple[list[ShardingSpec | None], np.ndarray]:
    """Per value, its spec and its bytes per device."""
    specs: list[ShardingSpec | None] = [None] * len(c.values)
    for op in c.ops:
        for value, spec in zip(op.results, result_specs[op.id], strict=True):
            specs[value] = spec
    num_shards = functools.cache(lambda spec: spec.num_shards(mesh))
    sizes = [
        0.0 if spec is None else value.num_bytes / num_shards(spec)
        for value, spec in zip(c.values, specs, strict=True)
    ]
    return specs, np.array(sizes)


def _held(liveness: Liveness, sizes: np.ndarray, time: int) -> np.ndarray:
    """Bytes of every value at one moment."""
    copies = ((liveness.start <= time) & (time <= liveness.end)).astype(float)
    if liveness.loop[0] <= time <= liveness.loop[1]:
        copies = copies + liveness.held
    return copies * sizes


def _without_idle_copies(
    c: Contraction, liveness: Liveness, specs: Sequence[ShardingSpec | None]
) -> Liveness:
    """Copies in the layout of what they copy are the same array, alive as long as either."""
    end, held = liveness.end.copy(), liveness.held.copy()
    for op in reversed(c.ops):
        if op.kind == "copy":
            (source,), (result,) = c.operands[op.id], op.results
            if specs[source] == specs[result] and end[source] >= liveness.start[source]:
                end[source], end[result] = max(end[source], end[result]), -1
                held[source], held[result] = max(held[source], held[result]), 0
    return replace(liveness, end=end, held=held)


def _totals(liveness: Liveness, sizes: np.ndarray) -> np.ndarray:
    steps = np.zeros(len(liveness.order) + 1)
    takes = liveness.end >= liveness.start
    np.add.at(steps, liveness.start[takes], sizes[takes])
    np.add.at(steps, liveness.end[takes] + 1, -sizes[takes])
    steps[liveness.loop[0]] += (liveness.held * sizes).sum()
    steps[liveness.loop[1] + 1] -= (liveness.held * sizes).sum()
    return np.cumsum(steps)[:-1]


class _Ranges:
    def __init__(self, contraction: Contraction) -> None:
        self.c = contraction
        self.order = _execution_order(contraction)
        self.time = {op: t for t, op in enumerate(self.order)}
        self.last = len(self.order) - 1
        self.start = np.zeros(len(contraction.values), dtype=np.int64)
        self.end = np.full(len(contraction.values), -1, dtype=np.int64)

    def run(self) -> Liveness:
        c = self.c
        internal = internal_values(c)
        spans = self.control_flow_spans()
        for op in c.ops:
            begin = self.time[op.id]
            if op.kind == "stack" and op.op is not None:
                begin = spans[id(op.op)][0]
            for value in op.results:
                self.start[value] = begin
                self.end[value] = -1 if value in internal else begin
        in_place = set()
        for op in c.ops:
            when = self.time[op.id]
            for value in c.operands[op.id]:
                if op.kind == "state":
                    in_place.add(value)
                elif value not in internal:
                    self.end[value] = max(self.end[value], when)
            if op.kind in ("enter", "carry") and op.op is not None:
                for value in op.results:
                    self.end[value] = max(self.end[value], spans[id(op.op)][1])
            if op.kind in ("state", "batch", "argument"):
                for value in op.results:
                    self.end[value] = self.last
        self.end[[v for v in c.program.outputs if v is not None]] = self.last
        for value in in_place:
            self.end[value] = -1
        loop = self.microbatch_loop()
        self.accumulate(loop)
        none = np.zeros(len(self.start))
        return Liveness(tuple(self.order), self.start, self.end, self.categories(), none, loop)

    def microbatch_loop(self) -> tuple[int, int]:
        """First and last time of the loop over microbatches; the last is -1 without one."""
        outermost, loop = self.c.program.graph, self.c.program.microbatching.loop_ops
        times = [
            time
            for time, index in enumerate(self.order)
            if (op := self.c.ops[index]).op is not None
            and op.graph is outermost
            and op.op.id in loop
        ]
        return min(times, default=0), max(times, default=-1)

    def accumulate(self, loop: tuple[int, int]) -> None:
        """Sums of gradients are there all through the loop, a microbatch's gradient is not."""
        program = self.c.program
        if program.microbatching.num_microbatches == 1:
            return
        grads = {g for region in program.graph.grad_regions for g in region.grads}
        links = [
            self.c.ops[link]
            for (kind, path, value), link in program.link_at.items()
            if kind == "gradient" and not path and value in grads
        ]
        gradients = [self.c.operands[link.id][0] for link in links]
        last_read = {v: int(self.start[v]) for v in gradients}
        for op in self.c.ops:
            if op.kind != "gradient":
                for value in last_read.keys() & {*self.c.operands[op.id]}:
                    last_read[value] = max(last_read[value], self.time[op.id])
        for link, gradient in zip(links, gradients, strict=True):
            self.start[link.results[0]] = loop[0]
            if self.end[gradient] >= 0:
                self.end[gradient] = last_read[gradient]

    def control_flow_spans(self) -> dict[int, tuple[int, int]]:
        """First and last time of each loop or branch op: its links and all of its body."""
        control = {id(o.op): o.op for o in self.c.ops if o.op is not None and o.op.subgraphs}
        times: dict[int, list[int]] = defaultdict(list)
        for op in self.c.ops if control else ():
            if op.op is not None:
                times[id(op.op)].append(self.time[op.id])
        spans = {}
        for key, held in control.items():
            inside = [t for body in held.subgraphs for o in body.walk() for t in times[id(o)]]
            spans[key] = (min(times[key] + inside), max(times[key] + inside))
        return spans

    def categories(self) -> np.ndarray:
        c = self.c
        graph = c.program.graph
        params = {p for r in graph.grad_regions for p in r.params if not isinstance(p, Literal)}
        params = {c.program.value_at[(), p] for p in params}
        result = np.full(len(c.values), CATEGORIES.index(TEMPORARIES))
        phases_of_readers: dict[int, set[str]] = defaultdict(set)
        for op in c.ops:
            for value in c.operands[op.id]:
                phases_of_readers[value].add(op.phase)
        for op in c.ops:
            for value in op.results:
                readers = phases_of_readers[value]
                if op.kind == "state":
                    is_param = value in params or (not params and readers & {FORWARD, BACKWARD})
                    name = PARAMETERS if is_param else OPTIMIZER
                elif op.kind == "gradient":
                    name = GRADIENTS
                elif op.kind in ("batch", "argument") or (
                    op.phase == FORWARD and BACKWARD in readers
                ):
                    name = ACTIVATIONS
                else:
                    continue
                result[value] = CATEGORIES.index(name)
            if op.kind == "gradient":
                result[list(op.operands)] = CATEGORIES.index(GRADIENTS)
        return result


def _execution_order(c: Contraction) -> list[int]:
    """Program order, each copy right before its first reader."""
    when = {op.id: op.id for op in c.program.ops}
    # A copy is read by ops of the program and by copies made after it.
    last = len(c.program.ops)
    when |= {copy.id: last for copy in c.ops[last:]}
    for op in reversed(c.ops):
        for value in c.operands[op.id]:
            producer = c.ops[c.definition[value]]
            if producer.kind == "copy":
                when[producer.id] = min(when[producer.id], when[op.id])
    return sorted(when, key=lambda i: (when[i], i < last, i))
