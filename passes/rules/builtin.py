"""Rules that no lowering can tell: random numbers, iota, identities, attention, opaque calls."""

from __future__ import annotations

from typing import Any

import jax

from alpa_lite.ir.flops import ATTENTION
from alpa_lite.passes.rules.equation import Equation
from alpa_lite.passes.rules.registry import parse_rule
from alpa_lite.passes.rules.rule import (
    Factor,
    FactorKind,
    Shape,
    ShardingRule,
    canonical_rule,
    elementwise_rule,
    replicated_rule,
)

OPAQUE = frozenset(
    {
        "custom_partitioning",
        "debug_callback",
        "ffi_call",
        "io_callback",
        "pallas_call",
        "pure_callback",
    }
)
"""Calls into code nobody can look into; register a rule for those worth sharding."""

OWN_MESH = frozenset({"shard_map", "xla_pmap"})
"""Programs for the parts of a mesh of their own: they cannot run inside of a step."""

GLOBAL_BODIES = frozenset({"custom_linear_solve", "linear_solve"})
"""Their params are jaxprs traced at the shapes of the whole arrays."""

ELEMENTWISE = frozenset(
    {
        "igamma",
        "igamma_grad_a",
        "igammac",
        "regularized_incomplete_beta",
        "sharding_constraint",
        "threefry2x32",
    }
)
"""Elementwise, but lowered to a loop or bound to a mesh. On a device, `sharding_constraint` is the
identity."""


def builtin_rule(equation: Equation) -> ShardingRule | None:
    """The rule of a primitive that is not derived from its lowering, or None."""
    name = equation.primitive.name
    operand_shapes, result_shapes = equation.operand_shapes, equation.result_shapes
    reason = _replication_reason(equation)
    if reason:
        return replicated_rule(operand_shapes, result_shapes, reason)
    if name == "iota":
        return _free_rule(result_shapes[0], "built in: the runtime adds the offset")
    if name == "random_bits":
        if _draws_by_position(equation):
            return _free_rule(result_shapes[0], "built in: bits depend on the position only", 1)
        return replicated_rule(operand_shapes, result_shapes, "needs one threefry key")
    if name in ATTENTION:
        return parse_rule(_attention_rule(equation), operand_shapes, result_shapes)
    if name in ELEMENTWISE:
        return elementwise_rule(result_shapes[0], operand_shapes, len(result_shapes), "built in")
    return None


def _replication_reason(equation: Equation) -> str:
    """Why an equation is not worth lowering, or `""`."""
    name = equation.primitive.name
    if name in OPAQUE:
        return f"{name} is opaque: register a sharding rule for it"
    avals = (*equation.in_avals, *equation.out_avals)
    if any(not _is_array(a) for a in avals):
        return f"{name} has an operand or result that is no array"
    if name != "random_bits" and any(_is_extended(a) for a in avals):
        return "PRNG keys are replicated"
    if any(0 in a.shape for a in avals):
        return "a dim has size 0"
    if name in GLOBAL_BODIES:
        return f"{name} holds functions of the whole arrays"
    if name.startswith("ragged_dot") and equation.in_avals[2].shape[-1] == 1:
        return "with one group, JAX lowers to sizes that are not those of a part"
    return ""


def _attention_rule(equation: Equation) -> str:
    """Batch and heads pass: a device that has some heads has the key heads that they read.

    Several query heads of one key head are not split backward: their gradients of it are one sum.
    """
    heads, kv_heads = (equation.operand_shapes[i][2] for i in (0, 1))
    forward = equation.primitive.name == "flash_attention"
    if heads == kv_heads:
        h, g, rest = "h", "h", ""
    elif kv_heads == 1:
        h, g, rest = "r", "1", "" if forward else " r"
    else:
        h, g, rest = "(h r)", "h", " r"
    q, k, v, out, lse = f"b q {h} d", f"b k {g} d", f"b k {g} e", f"b q {h} e", f"b {h} q"
    operands = [q, k, v] if forward else [q, k, v, lse, lse, out]
    results = [out, lse] if forward else [q, k, v]
    ids = ["b q", "b k"] if len(equation.in_avals) == len(operands) + 4 else []
    einsum = f"{', '.join([*operands, 'b', 'b', *ids])} -> {', '.join(results)}"
    return f"{einsum}; blocked=q k d e{rest}"


def _draws_by_position(equation: Equation) -> bool:
    """Whether each bit depends on the key and on its position alone."""
    (key,) = equation.in_avals
    partitionable = getattr(jax.config, "jax_threefry_partitionable", True)
    return key.shape == () and str(key.dtype) == "key<fry>" and partitionable


def _free_rule(shape: Shape, note: str, num_scalars: int = 0) -> ShardingRule:
    """All dims of the only result may be cut; operands are scalars."""
    factors = [Factor(size, FactorKind.PASS) for size in shape]
    result = [[i] for i in range(len(shape))]
    return canonical_rule(factors, [[]] * num_scalars, [result], "registered", note)


def _is_array(aval: Any) -> bool:
    return hasattr(aval, "shape") and hasattr(aval, "dtype") and aval.dtype != jax.dtypes.float0


def _is_extended(aval: Any) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
