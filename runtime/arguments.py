"""The arguments of a compiled step: checked, laid out as planned, and safe to donate.

In: input leaves as a caller gives them. Out: arrays in the plan's layouts, of which no donated one
was deleted before or shares a buffer with another. The runtime trusts its callers there: given
such an array it may end the process.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from alpa_lite.runtime.arrays import own_copy, put


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The input leaves of a compiled step.

    Attributes:
      names: path of each leaf.
      avals: shape and dtype of each.
      shardings: layout of each.
      donated: positions of those whose buffers the step takes over.
      rivals: positions that may share buffers, a donated one among them, as found by `find_rivals`.
    """

    names: tuple[str, ...]
    avals: tuple[jax.ShapeDtypeStruct, ...]
    shardings: tuple[NamedSharding, ...]
    donated: frozenset[int]
    rivals: tuple[tuple[int, ...], ...]


class OwnResults:
    """The arrays that the latest call returned: no two of them share a buffer."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Any]] = {}

    def __contains__(self, x: Any) -> bool:
        reference = self._references.get(id(x))
        return reference is not None and reference() is x

    def replace(self, results: Iterable[Any]) -> None:
        """Forget all others."""
        self._references = {id(x): weakref.ref(x) for x in results}


def find_rivals(
    avals: Sequence[Any], shardings: Sequence[NamedSharding], donated: Iterable[int]
) -> tuple[tuple[int, ...], ...]:
    """Groups of leaves with equal parts, since only these can share buffers."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, (aval, sharding) in enumerate(zip(avals, shardings, strict=True)):
        groups[sharding.shard_shape(aval.shape), aval.dtype].append(i)
    taken = set(donated)
    return tuple(tuple(g) for g in groups.values() if len(g) > 1 and not taken.isdisjoint(g))


def place(inputs: Inputs, leaves: Sequence[Any], own: OwnResults) -> list[Any]:
    """The leaves as the compiled step takes them.

    Args:
      inputs: what it takes.
      leaves: arrays that may lie anywhere, or numbers.
      own: results of the latest call; in the usual loop these are the next state, and need no
        look at their buffers.

    Raises:
      TypeError: a leaf has another shape or dtype, or is traced.
      ValueError: a leaf was deleted or donated.
    """
    placed = [_place(inputs, i, x) for i, x in enumerate(leaves)]
    for group in inputs.rivals:
        distinct = len({id(placed[i]) for i in group}) == len(group)
        if not distinct or any(
            isinstance(leaves[i], jax.Array) and placed[i] not in own for i in group
        ):
            _separate(inputs, group, placed)
    return placed


def leaf_aval(leaf: Any, name: str) -> Any:
    """Shape, dtype and weak type, as `jax.jit` sees them.

    Raises:
      TypeError: the leaf is no array; names it.
    """
    try:
        return jax.typeof(leaf)
    except TypeError:
        raise TypeError(
            f"arguments are pytrees of arrays and numbers: {name} is {leaf!r:.80}, of type "
            f"{type(leaf).__name__}. Leave it out, or make it an argument of its own and name that "
            "in static_argnums."
        ) from None


def refuse_traced(leaves: Iterable[Any], names: Any, step: str) -> None:
    """Refuse a call from inside a JAX transformation.

    Args:
      leaves: of the arguments.
      names: makes the path of each leaf; called only if one is traced.
      step: name of the step.

    Raises:
      TypeError: a leaf is traced; names it.
    """
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, jax.core.Tracer):
            raise _traced(names()[i], step)


def _place(inputs: Inputs, position: int, x: Any) -> Any:
    aval, wanted = inputs.avals[position], inputs.shardings[position]
    if isinstance(x, jax.core.Tracer):
        raise _traced(inputs.names[position], "a compiled step")
    found: Any = x
    if not isinstance(x, jax.Array):
        found = leaf_aval(x, inputs.names[position])
    elif x.is_deleted():
        raise _deleted(inputs, position)
    if found.shape != aval.shape or found.dtype != aval.dtype:
        raise TypeError(
            f"a compiled step takes the shapes and dtypes it was compiled for: "
            f"{inputs.names[position]} should be {_show(aval)}, found {_show(found)}. Convert it, "
            "or compile for these arguments; calling the step itself does so."
        )
    if not isinstance(x, jax.Array):
        x = np.asarray(x, aval.dtype)
    elif x.committed and (x.sharding is wanted or x.sharding.is_equivalent_to(wanted, x.ndim)):
        return x
    try:
        moved = put(x, wanted)
    except ValueError as error:
        raise ValueError(
            f"{inputs.names[position]}: {error}. Pass what `init` or the latest call returned, or "
            "the same numpy array in every process."
        ) from None
    if isinstance(moved, jax.core.Tracer):
        raise _traced(inputs.names[position], "a compiled step")
    return moved


def _separate(inputs: Inputs, group: Sequence[int], placed: list[Any]) -> None:
    """Copy donated leaves that share a buffer with one that is not, or with an earlier one."""
    taken: set[int] = set()
    for i in sorted(group, key=inputs.donated.__contains__):
        buffers = _buffers(placed[i])
        if i in inputs.donated and not taken.isdisjoint(buffers):
            placed[i] = own_copy(placed[i])
        else:
            taken |= buffers


def _buffers(x: Any) -> set[int]:
    count = len(x.sharding.addressable_devices)
    return {x.addressable_data(i).unsafe_buffer_pointer() for i in range(count)}


def _show(aval: Any) -> str:
    return f"{aval.dtype}{list(aval.shape)}"


def _deleted(inputs: Inputs, position: int) -> ValueError:
    what = f"{inputs.names[position]} ({_show(inputs.avals[position])})"
    if position not in inputs.donated:
        return ValueError(
            f"an argument must still have its values: {what} was deleted, or donated by an earlier "
            "call. Pass an array that is alive, or a copy made before that call."
        )
    return ValueError(
        f"a state is used once: {what} was donated by an earlier call, which updated it in place. "
        "Pass the state which that call returned, `state, aux = step(state, batch)`; copy the "
        "state before the call to keep it, or plan with donate_argnums=() for a function without "
        "state."
    )


def _traced(name: str, step: str) -> TypeError:
    return TypeError(
        f"{step} is a program of its own and runs on arrays: {name} is traced, because the call is "
        "inside jax.jit, grad, vmap, eval_shape or another parallelized step. Call it outside of "
        "these; to transform or nest the step, use the undecorated function (`step.__wrapped__`)."
    )
