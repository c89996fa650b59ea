"""Which inputs of a jaxpr are in pieces: found by rebuilding it until nothing changes.

In: jaxprs with the same inputs and outputs and a first guess. Out: `Settled`. What is wanted in
pieces shows up while a jaxpr is rebuilt: it becomes pieces, and the jaxpr is rebuilt again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alpa_lite import compat
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.pieces import Dims
from alpa_lite.passes.stages.piecewise import Rebuild, Settled


@dataclass(slots=True, eq=False)
class Splitter:
    """Settles the jaxprs of one step, each once.

    Attributes:
      num_pieces: blocks that an array in pieces has.
      table: where sharding rules are looked up.
      layer_scans: keys of the scans to cut, see `layer_scans.scan_key`.
    """

    num_pieces: int
    table: RuleTable
    layer_scans: frozenset[tuple[int, int]]
    _settled: dict[Any, tuple[Any, Settled]] = field(default_factory=dict)

    def settle(
        self,
        bodies: Sequence[Any],
        dims: Dims,
        *,
        pinned: frozenset[int] = frozenset(),
        differentiated: bool = False,
        keep_dead_code: bool = False,
    ) -> Settled:
        """Rebuild nested jaxprs until the inputs that are wanted in pieces are.

        Args:
          bodies: closed jaxprs with the same inputs and outputs, such as branches.
          dims: the inputs that are in pieces anyway.
          pinned: inputs that stay in pieces even if something needs them whole too. A note says
            where something computed of them is made whole and then cut.
          differentiated: whether a derivative will be taken.
          keep_dead_code: whether to leave in what nothing reads.
        """
        # The bodies are kept, so that no other object gets their ids.
        key = (tuple(id(compat.jaxpr_parts(b)[0]) for b in bodies), dims, pinned, differentiated)
        if key not in self._settled:
            done = _Settling(self, bodies, dims, set(pinned), differentiated, keep_dead_code).run()
            self._settled[key] = (bodies, done)
        return self._settled[key][1]

    def settle_step(self, closed: Any, aliases: Mapping[int, int]) -> Settled:
        """Rebuild a step, which starts with all inputs whole.

        Args:
          closed: its closed jaxpr.
          aliases: input position -> position of the output that has to have the same form.
        """
        dims = (None,) * len(closed.jaxpr.invars)
        return _Settling(self, [closed], dims, set(), False, False, aliases).run()


@dataclass(slots=True, eq=False)
class _Settling:
    splitter: Splitter
    bodies: Sequence[Any]
    dims: Dims
    pinned: set[int]
    differentiated: bool
    keep_dead_code: bool
    aliases: Mapping[int, int] = field(default_factory=dict)
    banned: set[int] = field(default_factory=set)

    def run(self) -> Settled:
        watched = frozenset(self.pinned)
        self.pinned |= {i for i, dim in enumerate(self.dims) if dim is not None}
        wanted: Dims = (None,) * len(compat.jaxpr_parts(self.bodies[0])[0].outvars)
        while True:
            runs = [Rebuild(self.splitter, self.differentiated, watched) for _ in self.bodies]
            built = [
                r.rebuild(body, self.dims, wanted)
                for r, body in zip(runs, self.bodies, strict=True)
            ]
            dims = self.next_dims(runs)
            next_wanted = self.next_wanted(runs, dims)
            if (dims, next_wanted) == (self.dims, wanted):
                if not self.keep_dead_code:
                    built = [compat.remove_dead_code(b) for b in built]
                notes = dict.fromkeys(note for run in runs for note in run.notes)
                return Settled(tuple(built), dims, runs[0].out_dims, tuple(notes))
            self.dims, wanted = dims, next_wanted

    def next_dims(self, runs: Sequence[Rebuild]) -> Dims:
        """Inputs that were wanted in pieces are, unless something needs them whole as well."""
        found = list(self.dims)
        for run in runs:
            self.banned |= run.joined - self.pinned
            for position, dim in run.demands.items():
                if found[position] is None:
                    found[position] = dim
        for position in self.banned:
            found[position] = None
        for i, o in self.aliases.items():
            natural = runs[0].natural[o]
            if natural is not None:
                # State that comes out in pieces goes in in pieces.
                self.pinned.add(i)
                self.banned.discard(i)
                found[i] = natural if found[i] is None else found[i]
        return tuple(found)

    def next_wanted(self, runs: Sequence[Rebuild], dims: Dims) -> Dims:
        """Outputs that one of several jaxprs gives in pieces, and those of state in pieces."""
        wanted: list[int | None] = [None] * len(runs[0].natural)
        if len(runs) > 1:
            each = zip(*(run.natural for run in runs), strict=True)
            wanted = [next((d for d in natural if d is not None), None) for natural in each]
        for i, o in self.aliases.items():
            wanted[o] = dims[i]
        return tuple(wanted)
