"""The part of each process in random programs: together they do what one process does."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alpa_lite.runtime.instructions import (
    MOVE,
    RECEIVE,
    RUN,
    SEND,
    Instruction,
    PipelineProgram,
    digests,
    own_part,
    verify_program,
    with_frees,
)
from alpa_lite.runtime.moves import Move
from alpa_lite.runtime.pipeline import execute

MESHES = 4
STATE = 3  # slots of the state: slot i on mesh i


@dataclass(frozen=True)
class FakeDevice:
    process_index: int
    id: int = 0


class FakeMesh:
    """Stands for a mesh, and for a sharding of it."""

    axis_names, spec = ("x",), ("x",)

    def __init__(self, processes: list[int]) -> None:
        self.devices = np.array([FakeDevice(p, i) for i, p in enumerate(processes)])
        self.processes = set(processes)

    @property
    def mesh(self) -> FakeMesh:
        return self


class Network:
    """Values on their way: sent ones stay where they are until somebody takes them."""

    def __init__(self) -> None:
        self.queues: dict[Any, deque[jax.Array]] = defaultdict(deque)

    def move(self, tag: int, source: FakeMesh, target: FakeMesh, me: int) -> Move:
        if source.processes == target.processes == {me}:
            return Move(start=jnp.copy)
        sender = min(source.processes)

        def send(x: jax.Array) -> None:
            if me == sender:
                for process in target.processes:
                    self.queues[tag, process].append(x)

        def receive() -> jax.Array:
            if not self.queues[tag, me]:
                raise BlockingIOError
            return jnp.copy(self.queues[tag, me].popleft())

        return Move(
            send=send if me in source.processes else None,
            receive=receive if me in target.processes else None,
            lends=True,
        )


def run_sum(*arrays: jax.Array) -> tuple[jax.Array]:
    return (sum(arrays) + 1.0,)


def random_program(seed: int, meshes: list[FakeMesh]) -> PipelineProgram:
    """Runs and moves over random meshes; some runs take over the state of theirs."""
    rng = np.random.default_rng(seed)
    homes = list(range(STATE))  # mesh of every slot
    alive = set(homes)
    listed: list[Instruction] = []
    for _ in range(24):
        mesh = int(rng.integers(MESHES))
        here = [s for s in alive if homes[s] == mesh]
        slot = len(homes)
        if here and rng.random() < 0.5:
            reads = sorted(rng.choice(here, min(2, len(here)), replace=False).tolist())
            donates = tuple(s for s in reads if s < STATE and rng.random() < 0.7)
            alive -= set(donates)
            listed.append(
                Instruction(
                    RUN, f"run {slot}", mesh, mesh, run_sum, tuple(reads), (slot,), (), donates
                )
            )
        else:
            read = int(rng.choice(sorted(alive)))
            listed.append(
                Instruction(MOVE, f"move {slot}", homes[read], mesh, None, (read,), (slot,), (), ())
            )
        homes.append(mesh)
        alive.add(slot)
    outputs = tuple(sorted(alive)[-4:])
    types = tuple((jax.ShapeDtypeStruct((2,), np.float32), meshes[m]) for m in homes)
    program = PipelineProgram(
        with_frees(listed, set(outputs)), types, {i: i for i in range(STATE)}, (), (), (), outputs,
        tuple(types[s] for s in outputs),
    )  # fmt: skip
    verify_program(program)
    return program


def with_moves(
    program: PipelineProgram, meshes: list[FakeMesh], network: Network, me: int
) -> PipelineProgram:
    """One channel per pair of meshes, as a value's type is the same everywhere."""
    moves = {
        (i.mesh, i.target): network.move(
            MESHES * i.mesh + i.target, meshes[i.mesh], meshes[i.target], me
        )
        for i in program.instructions
        if i.kind == MOVE
    }
    return replace(
        program,
        instructions=tuple(
            replace(i, move=moves[i.mesh, i.target]) if i.kind == MOVE else i
            for i in program.instructions
        ),
    )


def do(instruction: Instruction, slots: list[Any]) -> None:
    donated = [slots[s] for s in instruction.donates]
    execute(instruction, slots)
    for x in donated:
        x.delete()


def state(program: PipelineProgram) -> list[Any]:
    slots: list[Any] = [None] * len(program.types)
    slots[:STATE] = [jnp.full(2, 10.0**i) for i in range(STATE)]
    return slots


@pytest.mark.parametrize("seed", range(30))
def test_processes_do_together_what_one_does(seed, monkeypatch):
    rng = np.random.default_rng(1000 + seed)
    count = int(rng.integers(2, 4))
    meshes = [
        FakeMesh(sorted(rng.choice(count, rng.integers(1, 3), replace=False).tolist()))
        for _ in range(MESHES)
    ]
    program = random_program(seed, meshes)
    alone = FakeMesh([0])
    wanted = state(program)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    single = with_moves(program, [alone] * MESHES, Network(), 0)
    for each in own_part(
        replace(single, results=((None, alone),) * 4), [alone] * MESHES
    ).instructions:
        assert each.kind in (RUN, MOVE)
        do(each, wanted)

    network = Network()
    parts, slots = [], []
    for me in range(count):
        monkeypatch.setattr(jax, "process_index", lambda me=me: me)
        parts.append(own_part(with_moves(program, meshes, network, me), meshes))
        slots.append(state(program))
    at = [0] * count
    while any(at[i] < len(parts[i].instructions) for i in range(count)):
        before = list(at)
        for i, part in enumerate(parts):
            while at[i] < len(part.instructions):
                try:
                    do(part.instructions[at[i]], slots[i])
                except BlockingIOError:
                    break
                at[i] += 1
        assert at != before, "all processes wait"
    assert not any(network.queues.values()), "values that nobody takes"
    for i, part in enumerate(parts):
        for out, theirs, (_, mesh) in zip(
            part.outputs, program.outputs, program.results, strict=True
        ):
            if i in mesh.processes:
                np.testing.assert_array_equal(slots[i][out], wanted[theirs])
            else:
                assert out == ()
        kept = {s for s in part.outputs if isinstance(s, int)}
        made = {s for each in part.instructions for s in each.reads}
        assert all(slots[i][s] is None for s in made - kept)


def test_a_process_may_have_both_ends(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    meshes = [FakeMesh([0]), FakeMesh([0, 1])]
    network = Network()
    types = [(jax.ShapeDtypeStruct((2,), np.float32), m) for m in meshes]
    move = Instruction(
        MOVE, "m", 0, 1, None, (0,), (1,), (0,), (), move=network.move(0, *meshes, 0)
    )
    program = PipelineProgram((move,), tuple(types), {0: 0}, (), (), (), (1,), (types[1],))
    send, receive = own_part(program, meshes).instructions
    assert (send.kind, send.reads, send.writes, send.frees) == (SEND, (0,), (), (0,))
    assert (receive.kind, receive.reads, receive.writes) == (RECEIVE, (), (1,))


def test_hashes_tell_programs_apart():
    meshes = [FakeMesh([0]) for _ in range(MESHES)]
    program = random_program(0, meshes)
    assert digests(program) == digests(random_program(0, meshes))
    swapped = replace(program, instructions=program.instructions[::-1])
    assert digests(swapped)["instructions"] != digests(program)["instructions"]
    assert digests(swapped)["layouts"] == digests(program)["layouts"]
    (aval, mesh), *others = program.types
    wider = jax.ShapeDtypeStruct((3,), aval.dtype)
    assert (
        digests(replace(program, types=((wider, mesh), *others)))["layouts"]
        != (digests(program)["layouts"])
    )
