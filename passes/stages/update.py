"""The update split by stage: where each equation after the gradient runs, and what is sent for it.

In: `StepParts` and its `StageCut`s. Out: `UpdateSplit`. An equation runs where its operands are:
next to the gradients and parameters it reads. What reads nothing of that kind (step counters,
schedules) runs on every stage that needs it, and so does what makes an array of a number. Where
operands meet from several stages, the equation runs where most bytes are; numbers (global norm,
all-finite) meet on one stage and are sent back, so nothing but numbers moves for them. A parameter
that several stages read belongs to the first of them: it is sent to the others at the start of the
step, and their gradients come to it at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alpa_lite import compat
from alpa_lite.ir.graph import aval_bytes
from alpa_lite.passes.stages.cut import StageCut
from alpa_lite.passes.stages.parts import StepParts, variables, where

# Where scalars of several stages meet: backward passes end on the first stage.
MEETING_STAGE = 0


@dataclass(frozen=True, slots=True)
class Contribution:
    """A gradient, loss or aux output of one stage, combined over its microbatches.

    Attributes:
      variable: in `StepParts.after` that it is all or a part of.
      stage: which computes it.
      is_gradient: of `StepParts.grads`; else of `StepParts.results`.
      index: position there.
      share: of the microbatches that take the stage's pipeline; parts of several are weighted sums.
    """

    variable: Any
    stage: int
    is_gradient: bool
    index: int
    share: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class UpdateSplit:
    """Where the update runs.

    Attributes:
      input_homes: per step input, the stage on which it lies between steps; None for a batch input
        and for an argument that is no state.
      output_homes: per step output, the stage that returns it.
      equations: per stage, positions in `parts.after` in order.
      before: per stage, positions in `parts.before` that its update reads.
      contributions: per variable of a gradient, loss or aux output, its parts.
      sums: per stage, the variables of several contributions that are summed there.
      per_example: variables of results that have rows of the batch: every stage that computes a
        part returns it as it is.
      sends: (variable or contribution, source, target): once per step.
      notes: what the user should know.
    """

    input_homes: tuple[int | None, ...]
    output_homes: tuple[int, ...]
    equations: tuple[tuple[int, ...], ...]
    before: tuple[tuple[int, ...], ...]
    contributions: Mapping[Any, tuple[Contribution, ...]]
    sums: tuple[tuple[Any, ...], ...]
    per_example: frozenset[Any]
    sends: tuple[tuple[Any, int, int], ...]
    notes: tuple[str, ...]


def split_update(
    parts: StepParts,
    cuts: Sequence[StageCut],
    aliases: Mapping[int, int],
    shares: Sequence[float] | None = None,
    per_example: Iterable[int] = (),
) -> UpdateSplit:
    """Place the update.

    Args:
      parts: of the step.
      cuts: its forward pass in stages.
      aliases: input position -> output position of the state.
      shares: per stage, its part of the microbatches; all of them by default.
      per_example: positions of step outputs that have rows of the batch.
    """
    rows = frozenset(variables(parts.outputs[i] for i in per_example))
    return _Split(parts, cuts, aliases, shares or [1.0] * len(cuts), rows).run()


@dataclass(slots=True, eq=False)
class _Split:
    parts: StepParts
    cuts: Sequence[StageCut]
    aliases: Mapping[int, int]
    shares: Sequence[float]
    per_example: frozenset[Any]
    place: dict[Any, int] = field(default_factory=dict)
    """Variables that are on one stage only; others are computed wherever they are read."""
    needed: dict[Any, set[int]] = field(default_factory=lambda: defaultdict(set))
    notes: list[str] = field(default_factory=list)

    def run(self) -> UpdateSplit:
        parts = self.parts
        contributions = self.contributions()
        readers = self.forward_readers()
        for atom in parts.wrt:
            if atom in readers and not compat.is_literal(atom):
                self.place.setdefault(atom, min(readers[atom]))
        for variable, found in contributions.items():
            self.place[variable] = min(c.stage for c in found)
        for variable, atom in parts.grads:
            if variable in contributions and not compat.is_literal(atom):
                self.place[variable] = self.place[atom]
        homes = [self.place_equation(eqn) for eqn in parts.after]
        output_homes = self.output_homes()
        self.demand(homes, output_homes)
        input_homes = [
            output_homes[self.aliases[p]] if p in self.aliases else None
            for p in range(len(parts.inputs))
        ]
        num = len(self.cuts)
        equations = tuple(
            tuple(i for i, home in enumerate(homes) if stage in self.runs_on(i, home))
            for stage in range(num)
        )
        before = tuple(
            tuple(
                i
                for i, eqn in enumerate(parts.before)
                if any(stage in self.needed[v] for v in eqn.outvars)
            )
            for stage in range(num)
        )
        sums = tuple(
            tuple(
                v
                for v, found in contributions.items()
                if len(found) > 1 and self.place[v] == s and v not in self.per_example
            )
            for s in range(num)
        )
        return UpdateSplit(
            tuple(input_homes), tuple(output_homes), equations, before, contributions,
            sums, self.per_example, self.sends(homes, input_homes, contributions, readers),
            tuple(dict.fromkeys(self.notes)),
        )  # fmt: skip

    def sends(
        self, homes: Sequence[int | None], input_homes: Sequence[int | None],
        contributions: Mapping[Any, Sequence[Contribution]], readers: Mapping[Any, set[int]],
    ) -> tuple[tuple[Any, int, int], ...]:  # fmt: skip
        """What is sent once per step."""
        found: list[tuple[Any, int, int]] = []
        for position, v in enumerate(self.parts.inputs):
            home = input_homes[position]
            if home is not None:
                wanted = self.needed[v] | readers.get(v, set())
                found += [(v, home, t) for t in sorted(wanted) if t != home]
        for variable, each in contributions.items():
            if len(each) > 1 and variable not in self.per_example:
                home = self.place[variable]
                found += [(c, c.stage, home) for c in each if c.stage != home]
        made = [*contributions]
        made += [
            v
            for eqn, home in zip(self.parts.after, homes, strict=True)
            if home is not None
            for v in eqn.outvars
        ]
        for v in made:
            home = self.place[v]
            found += [(v, home, t) for t in sorted(self.needed[v]) if t != home]
        return tuple(found)

    def contributions(self) -> dict[Any, tuple[Contribution, ...]]:
        found: dict[Any, list[Contribution]] = defaultdict(list)
        for cut in self.cuts:
            share = self.shares[cut.index]
            for index in cut.results:
                variable = self.parts.results[index][0]
                found[variable].append(Contribution(variable, cut.index, False, index, share))
            for index, (variable, atom) in enumerate(self.parts.grads):
                if atom in cut.wrt:
                    found[variable].append(Contribution(variable, cut.index, True, index, share))
        return {variable: tuple(each) for variable, each in found.items()}

    def forward_readers(self) -> dict[Any, set[int]]:
        """Stages whose forward pass reads an input or a result of `before`."""
        readers: dict[Any, set[int]] = defaultdict(set)
        for cut in self.cuts:
            inside = [self.parts.loop[i] for each in cut.segments for i in each]
            inside += [self.parts.before[i] for i in cut.before]
            for v in [v for eqn in inside for v in variables(eqn.invars)]:
                readers[v].add(cut.index)
            for index in cut.results:
                for v in variables([self.parts.results[index][1]]):
                    readers[v].add(cut.index)
        return readers

    def place_equation(self, eqn: Any) -> int | None:
        """The stage of an equation, None if it runs wherever it is needed."""
        found = [v for v in variables(eqn.invars) if v in self.place]
        if not found:
            return None
        weight: dict[int, int] = defaultdict(int)
        for v in found:
            weight[self.place[v]] += 0 if _is_small(v) else aval_bytes(v.aval)
        if len(weight) == 1:
            (stage,) = weight
            if all(map(_is_small, found)) and not all(map(_is_small, eqn.outvars)):
                return None  # the number is sent rather than the array that is made of it
        elif not any(weight.values()):
            stage = MEETING_STAGE
        else:
            stage = max(weight, key=lambda s: (weight[s], -s))
            moved = sum(weight.values()) - weight[stage]
            if moved:
                self.notes.append(
                    f"{eqn.primitive.name} at {where(eqn)} reads arrays of several stages after "
                    f"the gradient: {moved} bytes are sent for it once per step"
                )
        for v in eqn.outvars:
            self.place[v] = stage
        return stage

    def output_homes(self) -> list[int]:
        state_of = {out: position for position, out in self.aliases.items()}
        at = {v: position for position, v in enumerate(self.parts.inputs)}
        homes = []
        for position, atom in enumerate(self.parts.outputs):
            home = None if compat.is_literal(atom) else self.place.get(atom)
            if home is None and position in state_of:
                home = self.place.get(self.parts.inputs[state_of[position]])
            homes.append(MEETING_STAGE if home is None else home)
        for position, atom in enumerate(self.parts.outputs):
            if not compat.is_literal(atom) and at.get(atom) in self.aliases:
                homes[position] = homes[self.aliases[at[atom]]]  # state as it was, where it lies
        return homes

    def demand(self, homes: Sequence[int | None], output_homes: Sequence[int]) -> None:
        """Which stages need each variable."""
        for atom, home in zip(self.parts.outputs, output_homes, strict=True):
            if not compat.is_literal(atom):
                self.needed[atom].add(home)
        for i in reversed(range(len(homes))):
            eqn = self.parts.after[i]
            for v in variables(eqn.invars):
                self.needed[v] |= self.runs_on(i, homes[i])
        for eqn in reversed(self.parts.before):
            on = set().union(*(self.needed[v] for v in eqn.outvars))
            for v in variables(eqn.invars):
                self.needed[v] |= on

    def runs_on(self, index: int, home: int | None) -> set[int]:
        if home is not None:
            return {home}
        return set().union(*(self.needed[v] for v in self.parts.after[index].outvars))


def _is_small(variable: Any) -> bool:
    """Whether a variable is one number."""
    return int(np.prod(variable.aval.shape, dtype=np.int64)) <= 1
