"""Arrays whole or in pieces, and how one equation runs piece by piece.

In: the sharding rule of an equation and which of its operands are in pieces. Out: a `PieceRule`,
the one factor along which the equation is cut: what to hand to each of the bindings and what comes
out of them. Data and decisions only; `piecewise.py` binds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from alpa_lite import compat
from alpa_lite.passes.rules import Equation, FactorKind, RuleTable, ShardingRule
from alpa_lite.passes.rules.rule import TensorFactors

SUMS_INTO_OPERAND = "scatter-add"
"""Its partial results each contain the operand: their sum would count it once per piece."""

UNRULED = frozenset(
    """cond custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr iota random_bits remat2 checkpoint
    scan value_and_grad while""".split()
)
"""Primitives that hold a program of their own or depend on positions: no rule is looked up."""


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """The equation that made a value: with it, the value can be made in pieces instead.

    Attributes:
      eqn: a jaxpr equation.
      operands: values in place of its operands.
      index: which of its results the value is.
      source_infos: of the equation and of the calls around it, innermost first.
    """

    eqn: Any
    operands: tuple[Value, ...]
    index: int
    source_infos: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A value as one array.

    Attributes:
      array: a tracer, constant or literal.
      origin: what made it, or its position among the inputs; None where it stays whole.
    """

    array: Any
    origin: Origin | int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """A value as equal blocks along one dim.

    Attributes:
      arrays: the blocks, in order.
      dim: the dim.
      position: among the inputs, if it is one.
    """

    arrays: tuple[Any, ...]
    dim: int
    position: int | None = None


Value = Whole | Pieces

Dims = tuple[int | None, ...]
"""Per value the dim of its pieces, None if it is whole."""


def group(
    arrays: Sequence[Any], dims: Dims, num_pieces: int, *, inputs: bool = False
) -> list[Value]:
    """Values of the given forms from their arrays in a row; `inputs`: remember positions."""
    supply, values = iter(arrays), list[Value]()
    for i, dim in enumerate(dims):
        position = i if inputs else None
        if dim is None:
            values.append(Whole(next(supply), position))
        else:
            values.append(Pieces(tuple(next(supply) for _ in range(num_pieces)), dim, position))
    return values


def dim_of(value: Value) -> int | None:
    """Along which dim a value is in pieces, None if it is whole."""
    return value.dim if isinstance(value, Pieces) else None


def arrays_of(value: Value) -> tuple[Any, ...]:
    """The arrays a value consists of."""
    return value.arrays if isinstance(value, Pieces) else (value.array,)


def piece_shapes(aval: Any, dim: int | None, num_pieces: int) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the arrays of a value."""
    shape = list(aval.shape)
    if dim is not None:
        shape[dim] //= num_pieces
    struct = jax.ShapeDtypeStruct(tuple(shape), aval.dtype, weak_type=aval.weak_type)
    return [struct] * (1 if dim is None else num_pieces)


@dataclass(frozen=True, slots=True)
class PieceRule:
    """How an equation runs on pieces.

    Attributes:
      factor: of the sharding rule.
      operand_dims: per operand the dim of its pieces, None if every binding takes it whole.
      result_dims: per result the dim of its pieces, None if it comes out whole.
      combine: how whole results of all bindings become the result; `""` if they are the same.
    """

    factor: int
    operand_dims: Dims
    result_dims: Dims
    combine: str = ""


def rule_of(eqn: Any, table: RuleTable) -> ShardingRule | None:
    """The sharding rule of a jaxpr equation, None for those that have none."""
    equation = ruled_equation(eqn)
    return None if equation is None else table.lookup(equation)


def ruled_equation(eqn: Any) -> Equation | None:
    """What the rule of a jaxpr equation is looked up by, None for those that have none."""
    if eqn.primitive.name in UNRULED or compat.has_side_effect(eqn):
        return None
    ins, outs = (tuple(a.aval for a in atoms) for atoms in (eqn.invars, eqn.outvars))
    return Equation(eqn.primitive, compat.equation_params(eqn), ins, outs)


def cut_by_operands(
    name: str, rule: ShardingRule, dims: Sequence[int | None], num_pieces: int
) -> PieceRule | None:
    """How an equation runs whose operands are in pieces.

    Args:
      name: of the primitive.
      rule: its sharding rule, for whole shapes.
      dims: per operand the dim of its pieces, None if it is whole.
      num_pieces: how many.

    Returns:
      The rule that leaves most operands as they are, or None if there is none.
    """
    votes = Counter(
        factor
        for tensor, dim in zip(rule.operands, dims, strict=True)
        if dim is not None and (factor := _leading(tensor, dim)) is not None
    )
    for factor, _ in votes.most_common():
        found = _cut_along(rule, factor, num_pieces)
        if found is not None and not (found.combine and name == SUMS_INTO_OPERAND):
            return found
    return None


def cut_by_result(
    rule: ShardingRule, result: int, dim: int, num_pieces: int
) -> PieceRule | None:  # fmt: skip
    """How an equation makes one of its results in pieces along `dim`, or None."""
    factor = _leading(rule.results[result], dim)
    return None if factor is None else _cut_along(rule, factor, num_pieces)


def _cut_along(rule: ShardingRule, factor: int, num_pieces: int) -> PieceRule | None:
    kind = rule.factors[factor].kind
    if kind is FactorKind.BLOCKED or factor in rule.indexed:
        return None
    if rule.factors[factor].size % num_pieces:
        return None
    sides: list[Dims] = []
    for tensors in (rule.operands, rule.results):
        dims = []
        for tensor in tensors:
            dim = next((d for d, factors in enumerate(tensor) if factor in factors), None)
            if dim is not None and tensor[dim][0] != factor:
                return None  # the pieces would not be blocks
            dims.append(dim)
        sides.append(tuple(dims))
    return PieceRule(factor, sides[0], sides[1], rule.factors[factor].combine)


def _leading(tensor: TensorFactors, dim: int) -> int | None:
    """The factor that blocks of a dim cut."""
    return tensor[dim][0] if tensor[dim] else None
