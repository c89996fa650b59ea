"""A planned step as several compiled programs, for a pipeline: `compile_phases`.

In: a `PlannedStep` (a stage of a pipeline is one) and the devices of the stage. Out:
`PhasePrograms`, which a host loop calls: `prepare` once per step, the programs of `loop` once per
microbatch and in any order that respects what they read, the rounds of `update` once. Together they
do what the one program of `lower` does, with the same layouts and collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.pipeline import PlannedStep
from alpa_lite.passes.program import FlatOp
from alpa_lite.runtime.arrays import is_local
from alpa_lite.runtime.crossings import Border, border_of, find_crossings
from alpa_lite.runtime.interpreter import Env, Interpreter, Key
from alpa_lite.runtime.lower import as_traced, compile_local
from alpa_lite.runtime.microbatches import combined, fold_key, zeros
from alpa_lite.runtime.phase_cut import PhaseCut, cut_phases
from alpa_lite.runtime.segments import Exit, Segment

INPUT = "input"
BATCH = "batch"
INDEX = "index"
INVARIANT = "invariant"
STASH = "stash"
ACCUMULATOR = "accumulator"
LOOP_OUTPUT = "loop_output"
OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Slot:
    """What one argument or result of a program is.

    ===========  ===============================================  ==================================
    kind         meaning                                          number
    ===========  ===============================================  ==================================
    input        an input that is no batch leaf                   its position
    batch        a batch leaf's rows of one microbatch            its position
    index        which microbatch, int32                          0
    invariant    made by `prepare`, read by the others            any
    accumulator  a sum over microbatches                          any
    stash        of one microbatch, made by one program of the    any
                 loop for later ones; or made by one round of
                 the update for later ones
    loop_output  an output's rows of one microbatch               its position
    output       an output                                        its position
    ===========  ===============================================  ==================================
    """

    kind: str
    number: int


@dataclass(frozen=True, slots=True, eq=False)
class PhaseProgram:
    """A compiled part of a step.

    Attributes:
      name: readable.
      inputs, outputs: what each argument and result is.
      donated: positions of arguments whose buffers the results take over.
      in_shardings, out_shardings: layouts of arguments and results.
      in_avals, out_avals: their shapes and dtypes; a pending sum has one more dim in front.
      compiled: takes arrays and returns a tuple of arrays; None if this process has none of the
        devices.
    """

    name: str
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    donated: frozenset[int]
    in_shardings: tuple[NamedSharding, ...]
    out_shardings: tuple[NamedSharding, ...]
    in_avals: tuple[jax.ShapeDtypeStruct, ...]
    out_avals: tuple[jax.ShapeDtypeStruct, ...]
    compiled: Any

    def __call__(self, *args: Any) -> tuple[jax.Array, ...]:
        """Run it."""
        return self.compiled(*args)


@dataclass(frozen=True, slots=True, eq=False)
class PhasePrograms:
    """The programs of a step.

    Attributes:
      prepare: run before the first microbatch, if there is anything to prepare.
      loop: run for every microbatch: `forward`, and `backward` or `backward_input` and
        `backward_weight`; those with nothing to do are left out.
      update: run after the last microbatch, one per round; None for a round with nothing to do.
      passed: outputs that are inputs as they are: output position -> input position. No program
        returns them.
      stash_bytes: bytes per device that one microbatch holds after each program of `loop` for the
        later ones, rows of batch leaves left out.
    """

    prepare: PhaseProgram | None
    loop: tuple[PhaseProgram, ...]
    update: tuple[PhaseProgram | None, ...]
    passed: Mapping[int, int]
    stash_bytes: tuple[int, ...]

    @property
    def programs(self) -> tuple[PhaseProgram, ...]:
        """All of them."""
        found = (self.prepare, *self.loop, *self.update)
        return tuple(p for p in found if p is not None)


def compile_phases(
    planned: PlannedStep, mesh: jax.sharding.Mesh, *, split_backward: bool = False,
    update_rounds: Sequence[Collection[int]] | None = None, late_inputs: Collection[int] = (),
    donate: Collection[int] | None = None,
) -> PhasePrograms:  # fmt: skip
    """Compile a planned step as several programs, or describe them if others run them.

    Args:
      planned: plan and layouts.
      mesh: the devices, with the axes of the plan's mesh (`lower.device_mesh`).
      split_backward: whether the backward part is two programs: `backward_input` makes what leaves
        it for every microbatch (cotangents handed back), `backward_weight` the rest.
      update_rounds: ids of the ops of each round of the update, if it waits for inputs that arrive
        in between; those not named run in the first round that reads them. One round by default.
      late_inputs: positions of batch leaves that arrive with the backward pass.
      donate: positions of the inputs that may be donated to the update; the state by default. Those
        that an output takes over as they are stay as they are.

    Raises:
      ValueError: `mesh` has other axes than the plan, or the rounds are impossible.
    """
    d = planned.decisions
    found = tuple(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    if found != d.mesh.axes:
        raise ValueError(
            f"the devices of a plan form its mesh {d.mesh}, found {Mesh(found)}; make them with "
            "alpa_lite.runtime.lower.device_mesh(plan.mesh, devices)"
        )
    cut = cut_phases(
        d, planned.output_kinds, split_backward=split_backward, update_rounds=update_rounds,
        late_inputs=late_inputs,
    )  # fmt: skip
    donated = frozenset(d.contraction.program.aliases if donate is None else donate)
    return _Builder(Interpreter(d), cut, mesh, donated - set(cut.passed.values())).build()


@dataclass(frozen=True, slots=True)
class _Supply:
    """Where a segment gets an array from: programs' arguments, and what it makes of them."""

    slots: tuple[Slot, ...]
    make: Callable[..., Any]


@dataclass(slots=True, eq=False)
class _Draft:
    """A program to be: its segment, the keys that it reads, and those that it returns."""

    segment: Segment
    reads: tuple[Key, ...]
    inputs: list[Slot]
    outputs: list[Slot]
    returned: dict[Slot, Key]


class _Builder:
    def __init__(
        self, interpreter: Interpreter, cut: PhaseCut, mesh: jax.sharding.Mesh,
        donate: frozenset[int],
    ) -> None:  # fmt: skip
        self.interpreter = interpreter
        self.program = interpreter.program
        self.d = interpreter.d
        self.cut = cut
        self.mesh = mesh
        self.donate = donate
        self.segments = (cut.prepare, *cut.loop, *cut.update)
        self.first_update = 1 + len(cut.loop)
        self.exits = {e.value: e for segment in cut.loop for e in segment.exits}
        self.keys_in_loop = {
            link.results[0]
            for v, link in cut.parts.enters().items()
            if v in self.program.microbatching.keys
        }
        self.supplies: dict[Key, _Supply] = {}
        self.borders: dict[Slot, Border] = {}
        self.shardings: dict[ShardingSpec, NamedSharding] = {}
        given = self.given()
        self.reads, self.made = find_crossings(
            interpreter, self.segments, mesh, given, {*self.entered(), *self.exits}
        )

    def build(self) -> PhasePrograms:
        self.number_crossings()
        drafts = [self.draft(i) for i in range(len(self.segments))]
        programs = [
            self.compile(i, draft, drafts[i + 1 :]) if draft.outputs else None
            for i, draft in enumerate(drafts)
        ]
        update = tuple(programs[self.first_update :])
        return PhasePrograms(
            programs[0],
            tuple(p for p in programs[1 : self.first_update] if p is not None),
            update if any(update) else (),
            self.cut.passed,
            self.stash_bytes(drafts),
        )

    # Where arrays come from.

    def given(self) -> dict[Key, int]:
        """Keys of inputs and constants, see `find_crossings`; fills in their supplies."""
        graph = self.program.graph
        found: dict[Key, int] = {}
        at = {v: i for i, v in enumerate(graph.inputs)}
        named = {self.interpreter.input_value(i): v for i, v in enumerate(graph.inputs)}
        named |= {self.program.value_at[(), v]: v for v in graph.constants}
        for key, value in (*named.items(), *self.cut.direct.items()):
            if value in at:
                found[key] = at[value]
                self.supplies[key] = self.with_index(key, self.input_slot(at[value]))
            else:
                found[key] = -1 - value
                self.supplies[key] = _Supply((), lambda v=value: self.interpreter.constant(v))
        return found

    def input_slot(self, position: int) -> Slot:
        value = self.program.graph.values[self.program.graph.inputs[position]]
        link = self.interpreter.c.ops[self.program.link_at["input", (), position]]
        slot = Slot(BATCH if link.kind == "batch" else INPUT, position)
        spec = self.d.result_specs[link.id][0]
        weak = getattr(value.aval, "weak_type", False)
        self.borders[slot] = Border(value.shape, value.dtype, spec, weak)
        return slot

    def with_index(self, key: Key, slot: Slot) -> _Supply:
        """An array, folded with the microbatch's index if it is a key of the loop."""
        if key not in self.keys_in_loop:
            return _Supply((slot,), lambda x: x)
        index = Slot(INDEX, 0)
        self.borders[index] = Border((), jnp.dtype("int32"), ShardingSpec(()))
        return _Supply((slot, index), fold_key)

    def entered(self) -> list[Key]:
        """Invariants of the loop that `prepare` makes."""
        return [
            item.results[0]
            for item in self.cut.prepare.items
            if isinstance(item, FlatOp) and item.kind == "enter"
        ]

    def number_crossings(self) -> None:
        """Name what programs make for later ones."""
        for exit_ in self.exits.values():
            slot = Slot(ACCUMULATOR, exit_.value)
            self.borders[slot] = border_of(self.d, exit_.value)
            self.supplies[exit_.value] = _Supply((slot,), self.combiner(exit_))
        count = 0
        for position, keys in enumerate(self.reads):
            for key in keys:
                if key in self.supplies:
                    continue
                maker = self.made[key]
                assert maker < position, (key, maker, position)
                several = self.program.microbatching.is_loop
                in_loop = 0 < maker < self.first_update
                assert not (several and in_loop and position >= self.first_update), key
                slot = Slot(INVARIANT if maker == 0 else STASH, count)
                count += 1
                self.borders[slot] = border_of(self.d, key)
                self.supplies[key] = self.with_index(key, slot)

    def combiner(self, exit_: Exit) -> Callable[[jax.Array], jax.Array]:
        count = self.program.microbatching.num_microbatches
        return lambda total: combined(exit_, total, count)

    # Programs.

    def draft(self, position: int) -> _Draft:
        segment, reads = self.segments[position], self.reads[position]
        sums = [Slot(ACCUMULATOR, e.value) for e in segment.exits]
        inputs = dict.fromkeys(sums)
        inputs |= dict.fromkeys(s for key in reads for s in self.supplies[key].slots)
        later = {k for keys in self.reads[position + 1 :] for k in keys}
        returned = {
            self.supplies[key].slots[0]: key
            for key, maker in self.made.items()
            if maker == position and key in later and key not in self.exits
        }
        if position == 0:
            sums = [Slot(ACCUMULATOR, value) for value in self.exits]
        kind = LOOP_OUTPUT if 0 < position < self.first_update else OUTPUT
        outputs = [Slot(kind, i) for i in segment.outputs]
        for slot in outputs:
            self.borders[slot] = self.output_border(slot.number)
        return _Draft(segment, reads, list(inputs), [*sums, *outputs, *returned], returned)

    def output_border(self, position: int) -> Border:
        operand = self.program.graph.outputs[position]
        aval = self.program.graph.values[operand].aval if isinstance(operand, int) else operand.aval
        return Border(
            tuple(aval.shape), aval.dtype, self.interpreter.output_spec(position),
            getattr(aval, "weak_type", False),
        )  # fmt: skip

    def compile(self, position: int, draft: _Draft, later: Sequence[_Draft]) -> PhaseProgram:
        segment, interpreter = draft.segment, self.interpreter
        self.sort_for_donation(draft)
        read_later = {s for other in later for s in other.inputs}
        ins = [self.borders[s] for s in draft.inputs]
        outs = [self.borders[s] for s in draft.outputs]
        mesh = self.d.mesh
        donated = _matching(
            [(s in draft.outputs or (s not in read_later and self.may_donate(s, position)), b)
             for s, b in zip(draft.inputs, ins, strict=True)], outs, mesh,
        )  # fmt: skip

        def local(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            given = {
                slot: border.unpack(x)
                for slot, border, x in zip(draft.inputs, ins, arrays, strict=True)
            }
            env: Env = {}
            for key in draft.reads:
                supply = self.supplies[key]
                env[key] = supply.make(*(given[s] for s in supply.slots))
            outputs = dict(zip(segment.outputs, interpreter.run(segment, env), strict=True))
            found = []
            for slot, border in zip(draft.outputs, outs, strict=True):
                if slot.kind == ACCUMULATOR:
                    exit_ = self.exits[slot.number]
                    x = given[slot] + env[slot.number] if position else zeros(interpreter, exit_)
                elif slot in draft.returned:
                    x = env[draft.returned[slot]]
                else:
                    x = as_traced(self.program.graph, slot.number, outputs[slot.number])
                found.append(border.pack(x))
            return tuple(found)

        avals = [b.aval(mesh) for b in ins]
        in_shardings = tuple(map(self.sharding, ins))
        out_shardings = tuple(map(self.sharding, outs))
        compiled = None
        if is_local(self.mesh):
            compiled = compile_local(local, self.mesh, avals, in_shardings, out_shardings, donated)
        return PhaseProgram(
            segment.name, tuple(draft.inputs), tuple(draft.outputs), frozenset(donated),
            in_shardings, out_shardings, tuple(avals), tuple(b.aval(mesh) for b in outs), compiled,
        )  # fmt: skip

    def sharding(self, border: Border) -> NamedSharding:
        """One object per layout, which is quicker to compare."""
        return self.shardings.setdefault(border.spec, border.sharding(self.mesh))

    def sort_for_donation(self, draft: _Draft) -> None:
        """Put what is updated in place first, and in the same order on both sides.

        JAX pairs donated arguments and results of equal parts in order.
        """
        aliases = self.program.aliases

        def target(slot: Slot) -> Slot | None:
            if slot.kind == INPUT and slot.number in self.donate and slot.number in aliases:
                return Slot(OUTPUT, aliases[slot.number])
            return slot if slot.kind == ACCUMULATOR else None

        pairs = [(s, target(s)) for s in draft.inputs]
        pairs = [(a, b) for a, b in pairs if b in draft.outputs]
        firsts = [a for a, _ in pairs]
        draft.inputs = [*firsts, *(s for s in draft.inputs if s not in firsts)]
        results = [b for _, b in pairs if b is not None]
        draft.outputs = [*results, *(s for s in draft.outputs if s not in results)]

    def may_donate(self, slot: Slot, position: int) -> bool:
        """Whether nobody needs an argument after the last program that reads it."""
        if slot.kind == INPUT:
            return slot.number in self.donate and position >= self.first_update
        if slot.kind == STASH:
            return True
        return slot.kind in (ACCUMULATOR, INVARIANT) and position >= self.first_update

    def stash_bytes(self, drafts: Sequence[_Draft]) -> tuple[int, ...]:
        loop = range(1, self.first_update)
        found = []
        for after in loop:
            if not drafts[after].outputs:
                continue
            made = {s for i in loop if i <= after for s in drafts[i].returned}
            read = {s for i in loop if i > after for s in drafts[i].inputs}
            found.append(sum(self.borders[s].local_bytes(self.d.mesh) for s in made & read))
        return tuple(found)


def _matching(
    inputs: Sequence[tuple[bool, Border]], outputs: Sequence[Border], mesh: Mesh
) -> list[int]:
    """Positions of the inputs to donate: those for which a result has parts of the same type."""
    free: dict[Any, int] = {}
    for border in outputs:
        key = border.local_shape(mesh), border.dtype
        free[key] = free.get(key, 0) + 1
    found = []
    for position, (may, border) in enumerate(inputs):
        key = border.local_shape(mesh), border.dtype
        if may and free.get(key, 0) > 0:
            free[key] -= 1
            found.append(position)
    return found
