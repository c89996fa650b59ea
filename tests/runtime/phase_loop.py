"""A host loop over the programs of a step: the simplest runtime of a pipeline with one stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alpa_lite.passes.pipeline import PlannedStep
from alpa_lite.runtime.hlo import collective_bytes
from alpa_lite.runtime.interpreter import Interpreter
from alpa_lite.runtime.microbatches import batch_blocks
from alpa_lite.runtime.phases import PhaseProgram, PhasePrograms, Slot
from alpa_lite.runtime.segments import split_step

GPIPE = "gpipe"
ONE_F_ONE_B = "1f1b"


def task_order(name: str, num_programs: int, count: int) -> Iterator[tuple[int, int]]:
    """(position in `PhasePrograms.loop`, microbatch) in the order of a schedule.

    Weight gradients, if they are a program of their own, come one microbatch late under 1F1B.
    """
    if name == GPIPE:
        yield from ((p, m) for p in range(num_programs) for m in range(count))
        return
    for time in range(count + num_programs):
        for p in range(num_programs):
            if 0 <= time - p < count:
                yield p, time - p


@dataclass
class HostLoop:
    """Runs a step.

    Attributes:
      planned: what was planned.
      programs: its programs.
      runs: how often each program has run, by name.
    """

    planned: PlannedStep
    programs: PhasePrograms
    runs: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        decisions = self.planned.decisions
        self.program = decisions.contraction.program
        self.count = self.program.microbatching.num_microbatches
        self.parts = split_step(self.program, self.planned.output_kinds)
        self.blocks = batch_blocks(Interpreter(decisions), self.parts)

    def step(
        self, leaves: Sequence[Any], order: str = GPIPE, late: Any = None, join: bool = True
    ) -> list[Any]:
        """Outputs of one step.

        Args:
          leaves: of the arguments; donated ones are copied first.
          order: of the tasks.
          late: called before every round of the update but the first with the round and the
            outputs so far; returns the input leaves that have arrived, by position.
          join: whether per-example outputs of all microbatches are put back together.
        """
        graph = self.program.graph
        kinds = [op.kind for op in self.program.ops[: len(leaves)]]
        held: dict[Slot, Any] = {}
        for i, x in enumerate(leaves):
            if kinds[i] != "batch" and x is not None:
                held[Slot("input", i)] = jnp.copy(x)
        rows = [
            {
                Slot("index", 0): jnp.int32(m),
                **{
                    Slot("batch", i): self.microbatch(x, m)
                    for i, x in enumerate(leaves)
                    if kinds[i] == "batch"
                },
            }
            for m in range(self.count)
        ]
        if self.programs.prepare is not None:
            self.call(self.programs.prepare, held, {})
        for p, m in task_order(order, len(self.programs.loop), self.count):
            self.call(self.programs.loop[p], held, rows[m])
        if self.count == 1:
            held |= rows[0]
        for r, program in enumerate(self.programs.update):
            if r and late is not None:
                found = {s.number: x for s, x in held.items() if s.kind == "output"}
                held |= {Slot("input", i): x for i, x in late(r, found).items()}
            if program is not None:
                self.call(program, held, {})
        outputs = []
        for i in range(len(graph.outputs)):
            parts = [r[Slot("loop_output", i)] for r in rows if Slot("loop_output", i) in r]
            if i in self.programs.passed:
                at = self.programs.passed[i]
                outputs.append(leaves[at] if kinds[at] == "batch" else held[Slot("input", at)])
            elif Slot("output", i) in held:
                outputs.append(held[Slot("output", i)])
            elif self.count == 1:
                outputs.append(parts[0])
            else:
                outputs.append(self.joined(parts) if join else parts)
        return outputs

    def call(self, program: PhaseProgram, held: dict[Slot, Any], rows: dict[Slot, Any]) -> None:
        """Run one program; arrays it takes over are dropped."""
        self.runs[program.name] += 1
        own = {"batch", "index", "stash", "loop_output"} if rows else set()
        args = []
        for slot, sharding in zip(program.inputs, program.in_shardings, strict=True):
            store = rows if slot.kind in own else held
            x = store[slot]
            if slot.kind in ("input", "batch", "index"):
                x = store[slot] = jax.device_put(x, sharding)
            assert x.sharding.is_equivalent_to(sharding, x.ndim), slot
            args.append(x)
        results = program(*args)
        for i in program.donated:
            slot = program.inputs[i]
            del (rows if slot.kind in own else held)[slot]
            assert args[i].is_deleted(), (program.name, slot)
        for slot, x in zip(program.outputs, results, strict=True):
            (rows if slot.kind in own else held)[slot] = x

    def microbatch(self, x: Any, m: int) -> Any:
        """The rows that the one program gives to microbatch m."""
        x = np.asarray(x)
        cut = x.reshape(self.blocks, self.count, -1, *x.shape[1:])
        return cut[:, m].reshape(-1, *x.shape[1:])

    def joined(self, parts: Sequence[Any]) -> Any:
        """The reverse, for the parts of all microbatches."""
        arrays = [np.asarray(x) for x in parts]
        cut = np.stack([a.reshape(self.blocks, -1, *a.shape[1:]) for a in arrays], axis=1)
        return cut.reshape(-1, *arrays[0].shape[1:])

    def bytes(self) -> dict[tuple[str, tuple[str, ...] | None], float]:
        """Bytes per device and step of all programs' collectives, by kind and axes."""
        totals: Counter[Any] = Counter()
        loop = {p.name for p in self.programs.loop}
        for program in self.programs.programs:
            times = self.count if program.name in loop else 1
            mesh = self.planned.decisions.mesh
            for key, number in collective_bytes(program.compiled.as_text(), mesh).items():
                totals[key] += times * number
        return dict(totals)
