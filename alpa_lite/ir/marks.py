"""`mark_layer`: an optional hint where a pipeline may be cut."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

layer_mark_p = Primitive("layer_mark")


@layer_mark_p.def_impl
def _run(x: Any) -> Any:
    return x


@layer_mark_p.def_abstract_eval
def _abstract(x: Any) -> Any:
    return x.update(weak_type=getattr(x, "weak_type", False))


ad.deflinear2(layer_mark_p, lambda cotangent, x: [cotangent])
batching.primitive_batchers[layer_mark_p] = lambda args, dims: (
    layer_mark_p.bind(args[0]),
    dims[0],
)
mlir.register_lowering(layer_mark_p, lambda ctx, x: [x])


def mark_layer(x: Any) -> Any:
    """Mark the end of a layer: pipelines cut the model at marks and nowhere else.

    An identity that costs nothing. Without marks, layers are found by balancing FLOPs and bytes.
    Marks have to be at the top level of the loss function or in functions that it calls, not inside
    `scan`, `jax.checkpoint` or other transformed functions (those are one operation each).

    Args:
      x: what the layer hands on: a pytree of arrays, returned as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> float(mark_layer(jnp.float32(2.0)) * 3)
      6.0
    """
    leaves, tree = jax.tree.flatten(x)
    if leaves:
        leaves[-1] = layer_mark_p.bind(jax.numpy.asarray(leaves[-1]))
    return jax.tree.unflatten(tree, leaves)
