"""Wrong lists of instructions: on paper, since a wrong use of a donated array ends the process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from alpa_lite.runtime.instructions import (
    MOVE,
    RUN,
    Instruction,
    PipelineProgram,
    verify_program,
    with_frees,
)


def run(name: str, reads: tuple[int, ...], writes: tuple[int, ...], **options: Any) -> Instruction:
    defaults: dict[str, Any] = {"frees": (), "donates": ()}
    return Instruction(RUN, name, 0, 0, None, reads, writes, **{**defaults, **options})


def move(read: int, write: int) -> Instruction:
    return Instruction(MOVE, f"move {read}", 0, 1, None, (read,), (write,), (), ())


def program(*instructions: Instruction, outputs: Any = (9,)) -> PipelineProgram:
    """State in slot 0, an argument in 1, rows of two microbatches in 2 and 3, an index in 4."""
    kept = {s for out in outputs for s in ((out,) if isinstance(out, int) else out)}
    return PipelineProgram(
        with_frees(instructions, kept), (None,) * 10, {0: 0}, ((1, None, 1),),
        ((2, 0, None, 2), (2, 1, None, 3)), ((0, None, 4),), outputs, (None,) * len(outputs),
    )  # fmt: skip


GOOD = (
    run("forward", (0, 1, 2, 4), (5,)),
    move(5, 6),
    run("backward", (6, 3), (7,)),
    run("update", (0, 7), (9,), donates=(0, 7)),
)


def with_instruction(at: int, **changes: Any) -> PipelineProgram:
    """The good program with one instruction changed, frees of the others as they are."""
    found = program(*GOOD)
    listed = list(found.instructions)
    listed[at] = replace(listed[at], **changes)
    return replace(found, instructions=tuple(listed))


def test_a_good_program() -> None:
    found = program(*GOOD)
    verify_program(found)
    assert [i.frees for i in found.instructions] == [(1, 2, 4), (5,), (6, 3), (0, 7)]


def test_frees_are_last_reads() -> None:
    listed = [
        run("a", (0,), (5,)),
        run("b", (0, 5), (6,)),
        run("c", (5,), (9,)),
        run("d", (), (8,)),
    ]
    frees = [i.frees for i in with_frees(listed, {9})]
    assert frees == [(), (0,), (5,), ()]
    assert [i.frees for i in with_frees(listed, {9, 5, 0})] == [(), (), (), ()]


def test_a_slot_is_written_once() -> None:
    with pytest.raises(AssertionError, match="instruction 2, backward, writes slot 5 again"):
        verify_program(with_instruction(2, writes=(5,)))
    with pytest.raises(AssertionError, match="instruction 0, forward, writes slot 0 again"):
        verify_program(with_instruction(0, writes=(0,)))
    with pytest.raises(AssertionError, match="writes slot 5 again"):
        verify_program(with_instruction(0, writes=(5, 5)))


def test_a_slot_is_read_after_it_is_written() -> None:
    with pytest.raises(AssertionError, match="instruction 0, forward, reads slot 7, which is gone"):
        verify_program(with_instruction(0, reads=(7,)))


def test_a_slot_is_not_read_after_it_was_freed() -> None:
    with pytest.raises(AssertionError, match="instruction 2, backward, reads slot 5"):
        verify_program(with_instruction(2, reads=(6, 5)))
    with pytest.raises(AssertionError, match="instruction 1, move 5, reads slot 2"):
        verify_program(with_instruction(1, reads=(2,)))


def test_a_slot_is_not_read_after_it_was_donated() -> None:
    listed = (run("early", (0,), (5,), donates=(0,), frees=(0,)), *GOOD[1:])
    with pytest.raises(AssertionError, match="update, reads slot 0, which is gone"):
        verify_program(replace(program(*GOOD), instructions=listed))


def test_what_is_donated_is_freed() -> None:
    with pytest.raises(AssertionError, match="update donates slots and keeps them"):
        verify_program(with_instruction(3, frees=(0,)))
    with pytest.raises(AssertionError, match="forward donates slots and keeps them"):
        verify_program(program(run("forward", (0,), (5,), donates=(0,)), *GOOD[1:]))


def test_what_is_donated_is_no_other_argument_of_the_call() -> None:
    with pytest.raises(AssertionError, match="update takes over slot 0, which it reads twice"):
        verify_program(with_instruction(3, reads=(0, 7, 0)))


def test_a_slot_is_freed_once() -> None:
    with pytest.raises(AssertionError, match="instruction 2, backward, frees a slot twice"):
        verify_program(with_instruction(2, frees=(6, 3, 5)))


def test_outputs_are_there_at_the_end() -> None:
    with pytest.raises(AssertionError, match="output slot 9 is gone at the end"):
        verify_program(with_instruction(3, writes=(8,)))
    found = program(*GOOD, outputs=(9, (5, 7)))
    with pytest.raises(AssertionError, match="update donates slots and keeps them"):
        verify_program(found)
    found = program(*GOOD[:3], run("update", (0, 7), (9,)), outputs=(9, (5, 7)))
    verify_program(found)
