"""The instructions of a pipeline: `Instruction`, `PipelineProgram`, and their check.

In one global order, over integer slots. Every slot is written once; an instruction names the slots
that nobody reads after it, so that arrays are dropped as soon as they are not needed. The list is
the same in every process; `own_part` is what one of them does of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from alpa_lite.passes.schedules import Task
from alpa_lite.runtime.arrays import is_local
from alpa_lite.runtime.moves import Move

RUN = "run"
MOVE = "move"
SEND = "send"
RECEIVE = "receive"


@dataclass(frozen=True, slots=True, eq=False)
class Instruction:
    """One asynchronous call.

    Attributes:
      kind: `run` (a program of a stage) or `move` (a value to another mesh); in several processes
        a move between them is a `send` in some and a `receive` in others.
      name: readable.
      mesh: index of the mesh that does it; of a move, the source.
      target: of a move, the mesh that receives.
      call: takes and returns arrays: a program a tuple, a move one. None for what other processes
        do, and for moves of which `own_part` has not taken this process's end.
      reads, writes: slots.
      frees: slots that nobody reads afterwards, donated ones included.
      donates: slots whose buffers the call takes over.
      task: of the schedule, if it is one.
      move: of a move, its ends.
    """

    kind: str
    name: str
    mesh: int
    target: int
    call: Callable[..., Any] | None
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...]
    donates: tuple[int, ...]
    task: Task | None = None
    move: Move | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PipelineProgram:
    """Everything that runs in one step.

    Attributes:
      instructions: in order.
      types: (type, sharding) of every slot.
      state: per state input of the step, its slot.
      arguments: (position of a step input, sharding, slot): inputs that are no state and no batch.
      rows: (position of a batch input, microbatch, sharding, slot).
      indices: (microbatch, sharding, slot): numbers of microbatches.
      outputs: per output of the step, its slot, or slots of all microbatches to be joined; none
        if it is on devices of other processes.
      results: (type, sharding) of every output.
    """

    instructions: tuple[Instruction, ...]
    types: tuple[tuple[Any, Any], ...]
    state: Mapping[int, int]
    arguments: tuple[tuple[int, Any, int], ...]
    rows: tuple[tuple[int, int, Any, int], ...]
    indices: tuple[tuple[int, Any, int], ...]
    outputs: tuple[int | tuple[int, ...], ...]
    results: tuple[tuple[Any, Any], ...]


def digests(program: PipelineProgram) -> dict[str, str]:
    """What the programs of two processes must have in common, as hashes."""
    calls = [
        (i.kind, i.name, i.mesh, i.target, i.reads, i.writes, i.donates)
        for i in program.instructions
    ]
    values = [
        (tuple(aval.shape), str(aval.dtype), _layout_text(sharding))
        for aval, sharding in (*program.types, *program.results)
    ]
    found = {"instructions": [calls, program.outputs], "layouts": values}
    return {k: hashlib.sha256(repr(v).encode()).hexdigest() for k, v in found.items()}


def _layout_text(sharding: Any) -> str:
    mesh = sharding.mesh
    ids = [d.id for d in mesh.devices.flat]
    return f"{tuple(sharding.spec)} {mesh.axis_names} {mesh.devices.shape} {ids}"


def own_part(program: PipelineProgram, meshes: Sequence[jax.sharding.Mesh]) -> PipelineProgram:
    """What this process does of a program.

    Programs run where the process has devices of their mesh. Moves within the process stay moves;
    others become sends, receives, both in this order, or nothing.

    Args:
      program: of all processes.
      meshes: by their index in the instructions.

    Raises:
      AssertionError: the instructions are wrong: see `verify_program`.
    """
    here = [is_local(mesh) for mesh in meshes]
    found: list[Instruction] = []
    donated: set[int] = set()  # by instructions that come later
    for each in reversed(program.instructions):
        if each.move is not None:
            found.extend(reversed(_own_ends(each, each.move, donated)))
        elif here[each.mesh]:
            found.append(each)
            donated.update(each.donates)
    outputs = tuple(
        slots if is_local(sharding) else ()
        for slots, (_, sharding) in zip(program.outputs, program.results, strict=True)
    )
    kept = {s for out in outputs for s in ((out,) if isinstance(out, int) else out)}
    own = replace(
        program,
        instructions=with_frees(found[::-1], kept),
        arguments=tuple(a for a in program.arguments if is_local(a[1])),
        rows=tuple(r for r in program.rows if is_local(r[2])),
        indices=tuple(i for i in program.indices if is_local(i[1])),
        outputs=outputs,
    )
    verify_program(own)
    return own


def _own_ends(each: Instruction, move: Move, donated: Collection[int]) -> list[Instruction]:
    """A move as the instructions of this process."""
    if move.start is not None:
        return [replace(each, call=move.start)]
    ends = []
    if move.send is not None:
        send = _copied(move.send) if move.lends and each.reads[0] in donated else move.send
        ends.append(replace(each, kind=SEND, call=send, writes=()))
    if move.receive is not None:
        ends.append(replace(each, kind=RECEIVE, call=move.receive, reads=()))
    return ends


def _copied(send: Callable[[jax.Array], None]) -> Callable[[jax.Array], None]:
    """Sends a copy, since the value itself may be gone before it is read."""
    copy = jax.jit(jnp.copy)
    return lambda x: send(copy(x))


def verify_program(program: PipelineProgram) -> None:
    """Check on paper what the runtime does not: a wrong use of a donated array ends the process.

    Raises:
      AssertionError: a slot is written twice, or read before it is written or after it was freed or
        donated, or also read by the instruction that takes it over.
    """
    alive = set(program.state.values())
    alive |= {slot for *_, slot in (*program.arguments, *program.rows, *program.indices)}
    written = set(alive)
    for at, each in enumerate(program.instructions):
        for slot in each.reads:
            assert slot in alive, f"instruction {at}, {each.name}, reads slot {slot}, which is gone"
        assert set(each.donates) <= set(each.frees), f"{each.name} donates slots and keeps them"
        assert set(each.frees) <= alive, f"instruction {at}, {each.name}, frees a slot twice"
        alive -= set(each.frees)
        for slot in each.donates:
            twice = each.reads.count(slot) > 1
            assert not twice, f"{each.name} takes over slot {slot}, which it reads twice"
        for slot in each.writes:
            assert slot not in written, f"instruction {at}, {each.name}, writes slot {slot} again"
            written.add(slot)
        alive |= set(each.writes)
    for out in program.outputs:
        for slot in (out,) if isinstance(out, int) else out:
            assert slot in alive, f"output slot {slot} is gone at the end"


def with_frees(instructions: Sequence[Instruction], kept: set[int]) -> tuple[Instruction, ...]:
    """The instructions with the slots that each is the last to read."""
    seen = set(kept)
    found = []
    for each in reversed(instructions):
        last = tuple(s for s in dict.fromkeys((*each.reads, *each.writes)) if s not in seen)
        seen.update(each.reads)
        seen.update(each.writes)
        frees = tuple(s for s in last if s in each.reads)
        found.append(replace(each, frees=frees))
    return tuple(reversed(found))
