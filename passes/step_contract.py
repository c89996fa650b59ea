"""The contract of a train step: `step(state, batch, ...) -> (state, aux)`.

In: a traced step and which arguments are state and batch. Out: which input leaf becomes which
output leaf, and which leaves are split over the microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from alpa_lite.errors import StepError
from alpa_lite.ir.trace import TracedStep


def state_aliases(step: TracedStep, donate_argnums: Sequence[int]) -> dict[int, int]:
    """Input position -> output position of every state leaf.

    The donated arguments must come back, in order, as the first outputs.

    Raises:
      StepError: the step returns no such state.
    """
    if not donate_argnums:
        return {}
    outputs = _top_level(step.out_tree)
    inputs = step.in_tree.children()
    aliases: dict[int, int] = {}
    start = 0
    for i, argnum in enumerate(donate_argnums):
        wanted = inputs[argnum]
        found = outputs[i] if i < len(outputs) else None
        if found is None or found != wanted:
            raise StepError(
                f"the step must return its state first: output {i} should have the structure of "
                f"argument {argnum}, {_shorten(wanted)}; found "
                f"{_shorten(found) if found is not None else 'no such output'}. Return "
                "(new_state, aux), or pass donate_argnums=() for a function without state."
            )
        _check_leaves(step, argnum, start)
        leaves = step.argument_range(argnum)
        aliases.update(zip(leaves, range(start, start + len(leaves)), strict=True))
        start += len(leaves)
    return aliases


def batch_positions(step: TracedStep, batch_argnums: Sequence[int]) -> frozenset[int]:
    """Positions of the batch leaves."""
    for argnum in batch_argnums:
        if not 0 <= argnum < len(step.argument_leaves):
            raise StepError(
                f"batch_argnums names argument {argnum}, but the step takes "
                f"{len(step.argument_leaves)} arguments"
            )
    return frozenset(p for a in batch_argnums for p in step.argument_range(a))


def split_batch(args: Sequence[Any], batch_argnums: Sequence[int], parts: int) -> tuple[Any, ...]:
    """The arguments with every batch leaf cut to one microbatch.

    Raises:
      StepError: a leaf's dim 0 does not divide.
    """

    def cut(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        shape = tuple(leaf.shape)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        what = f"batch leaf {name}" if name else "the batch"
        if not shape:
            raise StepError(
                f"{what} is a scalar and cannot be split into {parts} microbatches. Pass it as an "
                "argument that batch_argnums does not name, or use num_microbatches=1."
            )
        if shape[0] % parts:
            raise StepError(
                f"dim 0 of {what} {shape} cannot be split into {parts} microbatches: "
                f"{shape[0]} is not divisible by {parts}. Change the batch size or "
                "num_microbatches."
            )
        return jax.ShapeDtypeStruct(
            (shape[0] // parts, *shape[1:]), leaf.dtype, weak_type=jax.typeof(leaf).weak_type
        )

    return tuple(
        jax.tree_util.tree_map_with_path(cut, a) if i in batch_argnums else a
        for i, a in enumerate(args)
    )


def _top_level(tree: Any) -> list[Any]:
    data = tree.node_data()
    if data is not None and data[0] in (tuple, list):
        return tree.children()
    return [tree]


def _check_leaves(step: TracedStep, argnum: int, start: int) -> None:
    graph = step.graph
    for offset, position in enumerate(step.argument_range(argnum)):
        given = graph.values[graph.inputs[position]]
        out = graph.outputs[start + offset]
        aval = out.aval if not isinstance(out, int) else graph.values[out].aval
        if tuple(aval.shape) != given.shape or aval.dtype != given.dtype:
            raise StepError(
                f"state leaf {graph.input_names[position]} comes in as "
                f"{given.dtype}{list(given.shape)} and goes out as "
                f"{aval.dtype}{list(aval.shape)}; a state keeps its shapes and dtypes from step "
                "to step"
            )


def _shorten(tree: Any) -> str:
    text = str(tree)
    return text if len(text) <= 160 else text[:157] + "..."
