"""Floating-point operations of one equation, from its shapes alone.

Matrix products and convolutions count 2 per multiply-add; everything else counts one per element
of its largest operand or result (data movement counts none). Fused attention counts its matrix
products, over the pairs that its mask leaves. Loops multiply by their length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOVES = frozenset(
    """broadcast_in_dim reshape transpose squeeze expand_dims convert_element_type slice
    dynamic_slice dynamic_update_slice gather concatenate pad rev copy copy_p iota
    bitcast_convert_type optimization_barrier sharding_constraint name split
    random_wrap random_unwrap stop_gradient""".split()
)


ATTENTION = ("flash_attention", "flash_attention_backward")
_MATMULS = frozenset(
    ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general", *ATTENTION)
)


def equation_flops(
    name: str, params: Mapping[str, Any], ins: Sequence[Any], outs: Sequence[Any]
) -> float:
    """FLOPs of one execution of an equation without nested graphs.

    Args:
      name: primitive name.
      params: its parameters.
      ins: abstract operands.
      outs: abstract results.
    """
    if name == "dot_general":
        return _dot_flops(params, ins)
    if name == "conv_general_dilated":
        return _conv_flops(params, ins, outs)
    if name in ("ragged_dot", "ragged_dot_general"):
        return 2.0 * _numel(ins[0]) * outs[0].shape[-1]
    if name in ATTENTION:
        return _attention_flops(name, params["spec"], *ins[:3])
    if name in MOVES:
        return 0.0
    return float(max([*map(_numel, ins), *map(_numel, outs)], default=0))


def is_matmul(name: str) -> bool:
    """Whether the op runs on matrix units."""
    return name in _MATMULS


def visible_pairs(q_len: int, kv_len: int, left: int | None, right: int | None) -> int:
    """Pairs of a query and a key that it sees: position `p` sees `p - left` to `p + right`.

    Args:
      q_len: queries, at positions 0, 1, ...
      kv_len: keys, likewise.
      left: how far back a query sees; None for all.
      right: how far ahead.

    Example:
      >>> visible_pairs(4, 4, None, 0)  # causal
      10
    """
    at = np.arange(q_len)
    first = np.zeros_like(at) if left is None else np.maximum(at - left, 0)
    end = np.full_like(at, kv_len) if right is None else np.minimum(at + right + 1, kv_len)
    return int(np.maximum(end - first, 0).sum())


def _dot_flops(params: Mapping[str, Any], ins: Sequence[Any]) -> float:
    (_, rhs_contract), (_, rhs_batch) = params["dimension_numbers"]
    free = [
        n for d, n in enumerate(ins[1].shape) if d not in tuple(rhs_contract) + tuple(rhs_batch)
    ]
    return 2.0 * _numel(ins[0]) * math.prod(free)


def _attention_flops(name: str, spec: Any, q: Any, k: Any, v: Any) -> float:
    # Forward: scores and values. Backward: scores again, then the gradients of q, k, v and of the
    # probabilities: five products, however many an implementation makes.
    batch, q_len, heads, dim = q.shape
    pairs = batch * heads * visible_pairs(q_len, k.shape[1], spec.left, spec.right)
    v_dim = v.shape[-1]
    per_pair = dim + v_dim if name == "flash_attention" else 3 * dim + 2 * v_dim
    return 2.0 * pairs * per_pair


def _conv_flops(params: Mapping[str, Any], ins: Sequence[Any], outs: Sequence[Any]) -> float:
    # Every kernel element of one output channel's group is used once per output position. That
    # holds for batch groups too (kernel gradients of grouped convolutions): each uses its own part
    # of the batch, which is why the result has fewer positions.
    numbers = params["dimension_numbers"]
    out_features = ins[1].shape[numbers.rhs_spec[0]]
    per_output = _numel(ins[1]) / max(out_features, 1)
    dilated = math.prod(params.get("lhs_dilation") or (1,))
    return 2.0 * _numel(outs[0]) * per_output / dilated


def _numel(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ()))
