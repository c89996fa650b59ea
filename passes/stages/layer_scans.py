"""The scans over layers in the loss function of a step.

In: the outer jaxpr of a step, with its `value_and_grad` equation whole. Out: every `scan` that
reads, per iteration, a slice of something differentiated, largest first. That it reads a slice is
followed backwards along the scanned dim: through casts, transpositions, reshapes and whatever else
passes the dim through, to an operand that the loss is differentiated by. What is computed from the
batch does not count: a scan over hidden features computed from the batch and a weight is none.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import primitives as jax_primitives

from alpa_lite import compat
from alpa_lite.ir.grad import value_and_grad_p
from alpa_lite.ir.trace import called_body
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.layers import jaxpr_equation_flops
from alpa_lite.passes.stages.pieces import cut_by_result, rule_of, ruled_equation


@dataclass(frozen=True, slots=True, eq=False)
class LayerScan:
    """A scan whose slices are layers.

    Attributes:
      body: jaxpr of one iteration: it stays the same object however the scan is bound.
      length: iterations.
      reverse: whether it runs from the last slice to the first.
      flops: of all iterations.
      source: line of the user's code.
    """

    body: Any
    length: int
    reverse: bool
    flops: float
    source: str

    @property
    def key(self) -> tuple[int, int]:
        """What scan equations that are this one have in common; see `scan_key`."""
        return id(self.body), self.length


def scan_key(eqn: Any) -> tuple[int, int] | None:
    """`LayerScan.key` of an equation; None if it is no scan."""
    if eqn.primitive.name != "scan":
        return None
    return id(compat.jaxpr_parts(eqn.params["jaxpr"])[0]), eqn.params["length"]


def find_layer_scans(
    closed: Any, table: RuleTable, state: Container[int] = ()
) -> tuple[LayerScan, ...]:
    """The layer scans of a step, most FLOPs first.

    Args:
      closed: the step's closed jaxpr.
      table: where sharding rules are looked up.
      state: positions of inputs that are no part of the batch.
    """
    walk = _Walk()
    jaxpr, _ = compat.jaxpr_parts(closed)
    inputs = [walk.new() for _ in jaxpr.invars]
    walk.data |= {value for i, value in enumerate(inputs) if i not in state}
    walk.inline(jaxpr, inputs, (), in_loss=False)
    if not walk.scans:
        return ()
    _look_up(walk.equations, table)
    found = []
    for eqn, operands, source_infos in walk.scans:
        params = compat.equation_params(eqn)
        xs = operands[params["num_consts"] + params["num_carry"] :]
        found_in = (x for x in xs if x is not None and x not in walk.data)
        if any(walk.is_differentiated(x, params["length"], table) for x in found_in):
            body, _ = compat.jaxpr_parts(eqn.params["jaxpr"])
            source = compat.source_line(source_infos) or "an unknown place"
            flops = jaxpr_equation_flops(eqn)
            found.append(LayerScan(body, params["length"], params["reverse"], flops, source))
    return tuple(sorted(found, key=lambda scan: -scan.flops))


def _look_up(equations: Sequence[Any], table: RuleTable) -> None:
    """Derive all rules at once: one by one takes a hundred times as long."""
    wanted = [ruled_equation(eqn) for eqn in equations]
    table.lookup_many([w for w in wanted if w is not None and any(map(len, w.operand_shapes))])


@dataclass(slots=True, eq=False)
class _Walk:
    """The equations of a step with calls inlined; values are numbers, literals are None.

    Attributes:
      made_by: value -> (equation, operands, which result).
      outside: value inside the loss function -> the operand it stands for.
      differentiated: values inside the loss function by which it is differentiated.
      data: values computed from the batch, but for what they are differentiated by and for noise.
      scans: those of the loss function, with operands and source infos.
      equations: all.
    """

    made_by: dict[int, tuple[Any, tuple[int | None, ...], int]] = field(default_factory=dict)
    outside: dict[int, int | None] = field(default_factory=dict)
    differentiated: set[int] = field(default_factory=set)
    data: set[int] = field(default_factory=set)
    scans: list[tuple[Any, tuple[int | None, ...], tuple[Any, ...]]] = field(default_factory=list)
    equations: list[Any] = field(default_factory=list)
    count: int = 0

    def new(self) -> int:
        self.count += 1
        return self.count

    def inline(
        self, jaxpr: Any, args: Sequence[int | None], infos: tuple[Any, ...], *, in_loss: bool
    ) -> list[int | None]:
        """Collect the equations of a jaxpr; returns its outputs."""
        env: dict[Any, int | None] = {v: self.new() for v in jaxpr.constvars}
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atoms: Sequence[Any]) -> tuple[int | None, ...]:
            return tuple(None if compat.is_literal(a) else env[a] for a in atoms)

        for eqn in jaxpr.eqns:
            operands, here = read(eqn.invars), (eqn.source_info, *infos)
            body = called_body(eqn)
            if eqn.primitive is jax_primitives.remat_p:
                body = eqn.params["jaxpr"]
            if body is not None:
                results = self.inline(compat.jaxpr_parts(body)[0], operands, here, in_loss=in_loss)
            elif eqn.primitive is value_and_grad_p:
                results = self.gradient(eqn, operands)
            else:
                results = self.leaf(eqn, operands, here, in_loss=in_loss)
            env.update(zip(eqn.outvars, results, strict=True))
        return list(read(jaxpr.outvars))

    def gradient(self, eqn: Any, operands: tuple[int | None, ...]) -> list[int | None]:
        spec = eqn.params["spec"]
        inside = [self.new() for _ in operands]
        self.outside |= dict(zip(inside, operands, strict=True))
        self.differentiated |= {inside[i] for i in spec.wrt}
        self.data |= {i for i, o in zip(inside, operands, strict=True) if o in self.data}
        self.data -= self.differentiated
        forward, _ = compat.jaxpr_parts(spec.forward)
        outs = self.inline(forward, inside, (), in_loss=True)
        return [*outs, *(self.new() for _ in spec.wrt)]

    def leaf(
        self, eqn: Any, operands: tuple[int | None, ...], infos: tuple[Any, ...], *, in_loss: bool
    ) -> list[int | None]:
        if in_loss and eqn.primitive.name == "scan":
            self.scans.append((eqn, operands, infos))
        self.equations += [eqn, *_nested(eqn)]
        results = [self.new() for _ in eqn.outvars]
        self.made_by |= {r: (eqn, operands, i) for i, r in enumerate(results)}
        if not self.data.isdisjoint(operands) and not eqn.primitive.name.startswith("random_"):
            self.data |= set(results)
        return [*results]

    def is_differentiated(self, x: int, length: int, table: RuleTable) -> bool:
        """Whether slices along dim 0 of `x` come from slices of something differentiated."""
        stack, seen = [(x, 0)], set()
        while stack:
            value, dim = stack.pop()
            if (value, dim) in seen:
                continue
            seen.add((value, dim))
            if value in self.differentiated:
                return True
            outer = self.outside.get(value)
            if outer is not None:
                stack.append((outer, dim))
            elif value in self.made_by:
                stack += self.behind(value, dim, length, table)
        return False

    def behind(self, value: int, dim: int, length: int, table: RuleTable) -> list[tuple[int, int]]:
        """The operands, and their dims, of which slices make slices of a value."""
        eqn, operands, index = self.made_by[value]
        rule = rule_of(eqn, table)
        found = None if rule is None else cut_by_result(rule, index, dim, length)
        if found is None:
            return []
        pairs = zip(operands, found.operand_dims, strict=True)
        return [(o, d) for o, d in pairs if o is not None and d is not None]


def _nested(eqn: Any) -> list[Any]:
    """The equations inside of the branches and functions that an equation holds."""
    bodies = [*eqn.params.get("branches", ()), eqn.params.get("call_jaxpr"), called_body(eqn)]
    inner = [e for b in bodies if b is not None for e in compat.jaxpr_parts(b)[0].eqns]
    return [found for e in inner for found in (e, *_nested(e))]
