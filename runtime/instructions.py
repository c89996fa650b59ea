"""The instructions of a pipeline: `Instruction`, `PipelineProgram`, and their check.

In one global order, over integer slots. Every slot is written once; an instruction names the slots
that nobody reads after it, so that arrays are dropped as soon as they are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alpa_lite.passes.schedules import Task

RUN = "run"
MOVE = "move"


@dataclass(frozen=True, slots=True, eq=False)
class Instruction:
    """One asynchronous call.

    Attributes:
      kind: `run` (a program of a stage) or `move` (a value to another mesh).
      name: readable.
      mesh: index of the mesh that does it; of a move, the source.
      target: of a move, the mesh that receives.
      call: takes and returns arrays; a move takes one and returns one.
      reads, writes: slots.
      frees: slots that nobody reads afterwards, donated ones included.
      donates: slots whose buffers the call takes over.
      task: of the schedule, if it is one.
    """

    kind: str
    name: str
    mesh: int
    target: int
    call: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...]
    donates: tuple[int, ...]
    task: Task | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PipelineProgram:
    """Everything that runs in one step.

    Attributes:
      instructions: in order.
      num_slots: slots in use.
      state: per state input of the step, its slot.
      arguments: (position of a step input, sharding, slot): inputs that are no state and no batch.
      rows: (position of a batch input, microbatch, sharding, slot).
      indices: (microbatch, sharding, slot): numbers of microbatches.
      outputs: per output of the step, its slot, or slots of all microbatches to be joined.
    """

    instructions: tuple[Instruction, ...]
    num_slots: int
    state: Mapping[int, int]
    arguments: tuple[tuple[int, Any, int], ...]
    rows: tuple[tuple[int, int, Any, int], ...]
    indices: tuple[tuple[int, Any, int], ...]
    outputs: tuple[int | tuple[int, ...], ...]


def verify_program(program: PipelineProgram) -> None:
    """Check on paper what the runtime does not: a wrong use of a donated array ends the process.

    Raises:
      AssertionError: a slot is written twice, or read before it is written or after it was freed or
        donated.
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
        for slot in each.writes:
            assert slot not in written, f"instruction {at}, {each.name}, writes slot {slot} again"
        written |= set(each.writes)
        alive |= set(each.writes)
    for out in program.outputs:
        for slot in (out,) if isinstance(out, int) else out:
            assert slot in alive, f"output slot {slot} is gone at the end"


def with_frees(
    instructions: Sequence[Instruction], kept: set[int], count: int
) -> tuple[Instruction, ...]:
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
