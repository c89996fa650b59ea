"""Rebuilds a jaxpr on arrays in pieces, equation by equation.

In: a jaxpr and which of its inputs are in pieces. Out: a jaxpr of the pieces. Every equation runs
piece by piece where its sharding rule allows it; a partner that is whole is made in pieces from the
start if what made it can be, else sliced; partial results are combined. Where nothing of that is
possible, the pieces are concatenated, which is right but slower: a note says where.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np
from jax.extend.core import primitives as jax_primitives

from alpa_lite import compat
from alpa_lite.ir.grad import GradSpec, value_and_grad_p
from alpa_lite.ir.trace import called_body
from alpa_lite.passes.rules import RuleTable, ShardingRule, localize_params
from alpa_lite.passes.stages.layer_scans import scan_key
from alpa_lite.passes.stages.pieces import (
    Dims,
    Origin,
    PieceRule,
    Pieces,
    Value,
    Whole,
    arrays_of,
    cut_by_operands,
    cut_by_result,
    dim_of,
    group,
    piece_shapes,
    rule_of,
)

_COMBINE: Mapping[str, Callable[[Any, Any], Any]] = {
    "sum": jax.lax.add,
    "prod": jax.lax.mul,
    "max": jax.lax.max,
    "min": jax.lax.min,
    "and": jax.lax.bitwise_and,
    "or": jax.lax.bitwise_or,
}


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """Jaxprs of pieces that take the same inputs and give the same outputs.

    Attributes:
      bodies: closed jaxprs; inputs and outputs in pieces are that many arrays in a row.
      in_dims: per input of the jaxprs rebuilt.
      out_dims: per output of the jaxprs rebuilt.
      notes: what had to be concatenated.
    """

    bodies: tuple[Any, ...]
    in_dims: Dims
    out_dims: Dims
    notes: tuple[str, ...]


class Job(Protocol):
    """What all jaxprs of one step share; `settle.Splitter` is it."""

    num_pieces: int
    table: RuleTable
    layer_scans: frozenset[tuple[int, int]]

    def settle(
        self,
        bodies: Sequence[Any],
        dims: Dims,
        *,
        pinned: frozenset[int] = frozenset(),
        differentiated: bool = False,
        keep_dead_code: bool = False,
    ) -> Settled:
        """Rebuild nested jaxprs; see `settle.Splitter.settle`."""
        ...


@dataclass(slots=True, eq=False)
class Rebuild:
    """One jaxpr being rebuilt, once.

    Attributes:
      job: number of pieces, rules, the scans to cut, nested jaxprs.
      differentiated: whether a derivative will be taken: functions with their own stay whole.
      watched: inputs of which a note says where something computed of them had to be sliced.
      demands: inputs that came whole and were wanted in pieces -> along which dim.
      joined: inputs that came in pieces and were wanted whole.
      notes: what was concatenated.
      natural: dims of the outputs as they came out, None too where an input is handed through.
    """

    job: Job
    differentiated: bool
    watched: frozenset[int] = frozenset()
    demands: dict[int, int] = field(default_factory=dict)
    joined: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    natural: Dims = ()
    out_dims: Dims = ()
    _watched: set[Whole] = field(default_factory=set)
    _pieces: dict[tuple[Whole, int], Pieces] = field(default_factory=dict)
    _whole: dict[Pieces, Any] = field(default_factory=dict)
    _here: tuple[Any, tuple[Any, ...]] | None = None

    def rebuild(self, closed: Any, dims: Dims, wanted: Dims) -> Any:
        """The closed jaxpr on pieces.

        Args:
          closed: a jaxpr, closed or without constants.
          dims: forms of its inputs.
          wanted: forms its outputs must have; None where they may be as they come.
        """
        jaxpr, consts = compat.jaxpr_parts(closed)
        n = self.job.num_pieces
        avals = [
            a
            for v, dim in zip(jaxpr.invars, dims, strict=True)
            for a in piece_shapes(v.aval, dim, n)
        ]

        def flat(*leaves: Any) -> list[Any]:
            values = group(leaves, dims, n, inputs=True)
            outs = self.run(jaxpr, [Whole(c) for c in consts], values, ())
            given = set(map(id, values))
            self._here = None
            self.natural = tuple(None if id(o) in given else dim_of(o) for o in outs)
            forms = zip(outs, wanted, strict=True)
            outs = [o if dim is None else self.as_pieces(o, dim) for o, dim in forms]
            self.out_dims = tuple(map(dim_of, outs))
            return [a for o in outs for a in arrays_of(o)]

        return jax.make_jaxpr(flat)(*avals)

    def run(
        self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value], infos: tuple[Any, ...]
    ) -> list[Value]:
        """Evaluate a jaxpr, calls inlined."""
        env: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atoms: Sequence[Any]) -> list[Value]:
            return [Whole(a.val) if compat.is_literal(a) else env[a] for a in atoms]

        for eqn in jaxpr.eqns:
            operands, here = read(eqn.invars), (eqn.source_info, *infos)
            body = self.inlined_body(eqn)
            if body is not None:
                inner, inner_consts = compat.jaxpr_parts(body)
                results = self.run(inner, [Whole(c) for c in inner_consts], operands, here)
            else:
                self._here = (eqn, here)
                with compat.at_equation(eqn, here):
                    results = self.equation(eqn, operands, here)
            env.update(zip(eqn.outvars, results, strict=True))
        return read(jaxpr.outvars)

    def inlined_body(self, eqn: Any) -> Any | None:
        """The closed jaxpr of a call that dissolves, or None."""
        custom = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
        if eqn.primitive.name in custom and not self.differentiated:
            return eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
        return called_body(eqn)

    # Equations.

    def equation(self, eqn: Any, operands: list[Value], infos: tuple[Any, ...]) -> list[Value]:
        """Results of one equation that is no call."""
        name = eqn.primitive.name
        if scan_key(eqn) in self.job.layer_scans:
            return self.scan(eqn, operands)
        if eqn.primitive is value_and_grad_p:
            return self.gradient(eqn, operands)
        in_pieces = any(isinstance(o, Pieces) for o in operands)
        is_remat = eqn.primitive is jax_primitives.remat_p
        if is_remat and (in_pieces or self.holds_layer_scan(eqn)):
            return self.remat(eqn, operands)
        if not in_pieces:
            arrays = compat.bind_equation(eqn, [self.as_whole(o) for o in operands])
            return self.whole_results(eqn, operands, arrays, infos)
        if name == "sharding_constraint":
            return operands  # layouts are the plan's
        special = {"scan": self.scan_on_pieces, "cond": self.cond, "slice": self.pick}
        if name == "optimization_barrier":
            return self.barrier(eqn, operands)
        found = special[name](eqn, operands) if name in special else None
        if found is None:
            found = self.by_rule(eqn, operands)
        if found is None:
            arrays = compat.bind_equation(eqn, [self.as_whole(o) for o in operands])
            found = [Whole(a) for a in arrays]
        return found

    def whole_results(
        self, eqn: Any, operands: Sequence[Value], arrays: Sequence[Any], infos: tuple[Any, ...]
    ) -> list[Value]:
        """Results that can be made in pieces instead, should that be wanted."""
        results = [Whole(a, Origin(eqn, tuple(operands), i, infos)) for i, a in enumerate(arrays)]
        read = [o for o in operands if isinstance(o, Whole)]
        if any(o in self._watched or o.origin in self.watched for o in read):
            self._watched.update(results)
        return [*results]

    def by_rule(self, eqn: Any, operands: Sequence[Value]) -> list[Value] | None:
        """Results of an equation bound once per piece, None if it cannot be."""
        rule = rule_of(eqn, self.job.table)
        if rule is None:
            return None
        dims = tuple(map(dim_of, operands))
        cut = cut_by_operands(eqn.primitive.name, rule, dims, self.job.num_pieces)
        return None if cut is None else self.bind_pieces(eqn, rule, cut, operands)

    def bind_pieces(
        self, eqn: Any, rule: ShardingRule, cut: PieceRule, operands: Sequence[Value]
    ) -> list[Value]:
        """Results of an equation bound once per piece."""
        n = self.job.num_pieces
        columns = [
            (self.as_whole(o),) * n if dim is None else self.as_pieces(o, dim).arrays
            for o, dim in zip(operands, cut.operand_dims, strict=True)
        ]
        ins, outs = rule.local_shapes({cut.factor: n})
        params = compat.equation_params(eqn)
        params = localize_params(eqn.primitive.name, params, rule, ins, outs)
        rows = []
        for arrays in zip(*columns, strict=True):
            row = eqn.primitive.bind(*arrays, **params)
            row = list(row) if eqn.primitive.multiple_results else [row]
            assert tuple(r.shape for r in row) == outs, (eqn.primitive.name, row, outs)
            rows.append(row)
        results: list[Value] = []
        for arrays, dim in zip(zip(*rows, strict=True), cut.result_dims, strict=True):
            if dim is not None:
                results.append(Pieces(arrays, dim))
            elif cut.combine:
                results.append(Whole(functools.reduce(_COMBINE[cut.combine], arrays)))
            else:
                results.append(Whole(arrays[0]))
        return results

    def scan(self, eqn: Any, operands: Sequence[Value]) -> list[Value]:
        """Consecutive scans, the carry handed on; their scopes have a number."""
        n, params = self.job.num_pieces, compat.equation_params(eqn)
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        fixed = [self.as_whole(o) for o in operands[: num_consts + num_carry]]
        xs = [self.as_pieces(o, 0) for o in operands[num_consts + num_carry :]]
        consts, carry = fixed[:num_consts], fixed[num_consts:]
        shorter = {**eqn.params, "length": params["length"] // n}
        ys: dict[int, Sequence[Any]] = {}
        for i in reversed(range(n)) if params["reverse"] else range(n):
            with compat.numbered_scope(i):
                outs = eqn.primitive.bind(*consts, *carry, *(x.arrays[i] for x in xs), **shorter)
            carry, ys[i] = outs[:num_carry], outs[num_carry:]
        stacked = zip(*(ys[i] for i in range(n)), strict=True)
        return [*map(Whole, carry), *(Pieces(arrays, 0) for arrays in stacked)]

    def scan_on_pieces(self, eqn: Any, operands: Sequence[Value]) -> list[Value] | None:
        """Another scan over something in pieces."""
        params = compat.equation_params(eqn)
        xs = operands[params["num_consts"] + params["num_carry"] :]
        if params["length"] % self.job.num_pieces or all(dim_of(x) != 0 for x in xs):
            return None
        return self.scan(eqn, operands)

    def pick(self, eqn: Any, operands: Sequence[Value]) -> list[Value] | None:
        """A slice of one of the pieces, None if it reaches into several."""
        (operand,) = operands
        assert isinstance(operand, Pieces)
        dim, size = operand.dim, operand.arrays[0].shape[operand.dim]
        start, limit = eqn.params["start_indices"][dim], eqn.params["limit_indices"][dim]
        which = start // size
        if limit <= start or (limit - 1) // size != which:
            return None
        params = dict(eqn.params)
        for param, value in (("start_indices", start), ("limit_indices", limit)):
            indices = list(params[param])
            indices[dim] = value - which * size
            params[param] = tuple(indices)
        return [Whole(eqn.primitive.bind(operand.arrays[which], **params))]

    def barrier(self, eqn: Any, operands: Sequence[Value]) -> list[Value]:
        """One barrier for all pieces of all operands."""
        dims = tuple(map(dim_of, operands))
        arrays = [a for o in operands for a in arrays_of(o)]
        return group(eqn.primitive.bind(*arrays, **eqn.params), dims, self.job.num_pieces)

    # Equations with jaxprs inside.

    def gradient(self, eqn: Any, operands: Sequence[Value]) -> list[Value]:
        """The derivative by pieces."""
        spec: GradSpec = eqn.params["spec"]
        dims = tuple(map(dim_of, operands))
        settled = self.job.settle(
            [spec.forward], dims, pinned=frozenset(spec.wrt), differentiated=True
        )
        closed = settled.bodies[0]
        first = [len(closed.consts)]
        for dim in settled.in_dims:
            first.append(first[-1] + (1 if dim is None else self.job.num_pieces))
        new = GradSpec(
            compat.constants_as_operands(closed),
            first[spec.num_consts],
            tuple(p for i in spec.wrt for p in range(first[i], first[i + 1])),
        )
        arrays = self.flatten(operands, settled.in_dims)
        outs = value_and_grad_p.bind(*closed.consts, *arrays, spec=new)
        self.notes += settled.notes
        out_dims = (*settled.out_dims, *(settled.in_dims[i] for i in spec.wrt))
        return group(outs, out_dims, self.job.num_pieces)

    def cond(self, eqn: Any, operands: Sequence[Value]) -> list[Value]:
        """Branches of pieces."""
        index, *rest = operands
        dims = tuple(map(dim_of, rest))
        settled = self.job.settle(eqn.params["branches"], dims, differentiated=self.differentiated)
        arrays = self.flatten(rest, settled.in_dims)
        params = {**eqn.params, "branches": settled.bodies}
        outs = eqn.primitive.bind(self.as_whole(index), *arrays, **params)
        self.notes += settled.notes
        return group(outs, settled.out_dims, self.job.num_pieces)

    def remat(self, eqn: Any, operands: Sequence[Value]) -> list[Value]:
        """`jax.checkpoint`, once for each piece of a layer scan in it and what is in between."""
        settled = self.job.settle(
            [eqn.params["jaxpr"]], tuple(map(dim_of, operands)),
            differentiated=self.differentiated, keep_dead_code=True,
        )  # fmt: skip
        body = settled.bodies[0]
        jaxpr = compat.constants_as_operands(body).jaxpr
        arrays = [*body.consts, *self.flatten(operands, settled.in_dims)]
        env = dict(zip(jaxpr.invars, arrays, strict=True))
        prevent_cse = eqn.params["prevent_cse"]
        if not isinstance(prevent_cse, bool):
            prevent_cse = any(prevent_cse)
        number = itertools.count()
        for part in _parts(jaxpr, self.is_cut):
            params = {**eqn.params, "jaxpr": part, "prevent_cse": prevent_cse}
            scope: Any = contextlib.nullcontext()
            if any(map(self.is_cut, part.eqns)):
                scope = compat.numbered_scope(next(number) % self.job.num_pieces)
            with scope:
                outs = eqn.primitive.bind(*(env[v] for v in part.invars), **params)
            env.update(zip(part.outvars, outs, strict=True))
        self.notes += settled.notes
        outs = [a.val if compat.is_literal(a) else env[a] for a in jaxpr.outvars]
        return group(outs, settled.out_dims, self.job.num_pieces)

    def is_cut(self, eqn: Any) -> bool:
        """Whether an equation is a piece of a layer scan, or holds one."""
        key = scan_key(eqn)
        if key is not None:
            return any(key[0] == body for body, _ in self.job.layer_scans)
        if eqn.primitive is jax_primitives.remat_p:
            return any(map(self.is_cut, eqn.params["jaxpr"].eqns))
        return False

    def holds_layer_scan(self, eqn: Any) -> bool:
        """Whether a layer scan is somewhere in a `jax.checkpoint`, or in a call in it."""
        body = self.inlined_body(eqn)
        if eqn.primitive is jax_primitives.remat_p:
            body = eqn.params["jaxpr"]
        if body is None:
            return scan_key(eqn) in self.job.layer_scans
        return any(map(self.holds_layer_scan, compat.jaxpr_parts(body)[0].eqns))

    def flatten(self, operands: Sequence[Value], dims: Dims) -> list[Any]:
        """Arrays of the operands in the given forms."""
        arrays: list[Any] = []
        for operand, dim in zip(operands, dims, strict=True):
            arrays += (
                [self.as_whole(operand)] if dim is None else self.as_pieces(operand, dim).arrays
            )
        return arrays

    # From pieces to whole arrays and back.

    def as_whole(self, value: Value) -> Any:
        """One array; pieces are concatenated, with a note."""
        if isinstance(value, Whole):
            return value.array
        if value.position is not None:
            self.joined.add(value.position)
        if value not in self._whole:
            self._whole[value] = jax.lax.concatenate(value.arrays, value.dim)
        shape = list(self._whole[value].shape)
        self.notes.append(
            f"{_where(self._here)} needs a stacked array of shape {shape} whole: its "
            f"{len(value.arrays)} pieces are concatenated"
        )
        return self._whole[value]

    def as_pieces(self, value: Value, dim: int) -> Pieces:
        """The value in pieces along `dim`."""
        if isinstance(value, Pieces):
            if value.dim == dim:
                return value
            value = Whole(self.as_whole(value))
        if (value, dim) not in self._pieces:
            self._pieces[value, dim] = self.made_in_pieces(value, dim) or self.sliced(value, dim)
        return self._pieces[value, dim]

    def sliced(self, value: Whole, dim: int) -> Pieces:
        """Slices of the value."""
        n = self.job.num_pieces
        if value in self._watched and isinstance(value.origin, Origin):
            where = _where((value.origin.eqn, value.origin.source_infos))
            self.notes.append(
                f"{where} makes a stacked array of shape "
                f"{list(value.array.shape)} whole, which is then cut into {n} pieces"
            )
        size = value.array.shape[dim] // n
        return Pieces(
            tuple(
                jax.lax.slice_in_dim(value.array, i * size, (i + 1) * size, axis=dim)
                for i in range(n)
            ),
            dim,
        )

    def made_in_pieces(self, value: Whole, dim: int) -> Pieces | None:
        """The value made again in pieces from the operands of its equation, or None."""
        origin = value.origin
        if isinstance(origin, int):
            self.demands.setdefault(origin, dim)
        if not isinstance(origin, Origin):
            return None
        eqn, here = origin.eqn, (origin.eqn, origin.source_infos)
        if eqn.primitive.name == "iota":
            with compat.at_equation(*here):
                return self.iota(eqn, dim)
        rule = rule_of(eqn, self.job.table)
        cut = None if rule is None else cut_by_result(rule, origin.index, dim, self.job.num_pieces)
        if rule is None or cut is None:
            return None
        reader, self._here = self._here, here
        with compat.at_equation(*here):
            made = self.bind_pieces(eqn, rule, cut, origin.operands)[origin.index]
        self._here = reader
        assert isinstance(made, Pieces)
        return made

    def iota(self, eqn: Any, dim: int) -> Pieces:
        """An iota in pieces, each counted from its own start."""
        n, params = self.job.num_pieces, dict(eqn.params)
        shape = list(params["shape"])
        shape[dim] //= n
        block = eqn.primitive.bind(**{**params, "shape": tuple(shape), "sharding": None})
        if params["dimension"] != dim:
            return Pieces((block,) * n, dim)
        offsets = [np.asarray(i * shape[dim], params["dtype"]) for i in range(1, n)]
        return Pieces((block, *(jax.lax.add(block, offset) for offset in offsets)), dim)


def _where(place: tuple[Any, tuple[Any, ...]] | None) -> str:
    """An equation for notes; None is the end of the jaxpr."""
    if place is None:
        return "an output"
    eqn, source_infos = place
    return f"{eqn.primitive.name} at {compat.source_line(source_infos) or 'an unknown place'}"


def _parts(jaxpr: Any, is_cut: Callable[[Any], bool]) -> list[Any]:
    """Open jaxprs that do one after the other what a jaxpr does; cut equations are by themselves.

    Their inputs and outputs are variables of the jaxpr.
    """
    runs: list[list[Any]] = [[]]
    for eqn in jaxpr.eqns:
        if is_cut(eqn):
            runs += [[eqn], []]
        else:
            runs[-1].append(eqn)
    needed = {v for v in jaxpr.outvars if not compat.is_literal(v)}
    parts = []
    for run in reversed(runs):
        made = dict.fromkeys(v for eqn in run for v in eqn.outvars)
        outputs = [v for v in made if v in needed]
        if not outputs and not any(map(compat.has_side_effect, run)):
            continue
        part = compat.part_of_jaxpr(jaxpr, run, outputs)
        needed = (needed - made.keys()) | set(part.invars)
        parts.append(part)
    return parts[::-1]
