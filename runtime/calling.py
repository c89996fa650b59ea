"""How a step is called: which argument stands where, and what each is for.

In: the arguments of one call. Out: a `BoundCall`, with all arguments in one fixed order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from alpa_lite.errors import StepError
from alpa_lite.runtime.arguments import leaf_aval

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Argnums:
    """Argument numbers as `parallelize` takes them; negative ones count from the last argument.

    Attributes:
      batch, donate, static: numbers by what the arguments are for.
      static_names: names of further static arguments.
    """

    batch: tuple[int, ...]
    donate: tuple[int, ...]
    static: tuple[int, ...]
    static_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class BoundCall:
    """The arguments of one call: positional ones in order, then those passed by keyword, by name.

    Attributes:
      values: the arguments.
      names: their parameters.
      num_positional: how many are passed by position.
      static, batch, donate: positions in `values`.
    """

    values: tuple[Any, ...]
    names: tuple[str, ...]
    num_positional: int
    static: tuple[int, ...]
    batch: tuple[int, ...]
    donate: tuple[int, ...]

    @property
    def dynamic_positions(self) -> tuple[int, ...]:
        """Positions of the arguments that are not compile-time constants."""
        return tuple(i for i in range(len(self.values)) if i not in self.static)

    @property
    def dynamic(self) -> tuple[Any, ...]:
        """The arguments that are not compile-time constants."""
        return tuple(self.values[i] for i in self.dynamic_positions)

    def leaf_names(self) -> list[str]:
        """Path of every leaf of `dynamic`."""
        return [
            ".".join(part for part in (self.names[i], _path_text(path)) if part)
            for i in self.dynamic_positions
            for path, _ in jax.tree_util.tree_flatten_with_path(self.values[i])[0]
        ]

    def key(self) -> Any:
        """Equal for two calls that one compiled program serves."""
        leaves, tree = jax.tree.flatten(self.dynamic)
        static = tuple((type(self.values[i]), self.values[i]) for i in self.static)
        avals = tuple((a.shape, a.dtype, a.weak_type) for a in self.avals(leaves))
        return tree, self.names[self.num_positional :], self.static, static, avals

    def avals(self, leaves: Sequence[Any]) -> list[Any]:
        """Shape, dtype and weak type of the leaves of `dynamic`.

        Raises:
          TypeError: a leaf is no array; names it.
        """
        try:
            return [jax.typeof(x) for x in leaves]
        except TypeError:
            names = self.leaf_names()
            return [leaf_aval(x, name) for x, name in zip(leaves, names, strict=True)]


def signature_of(fn: Callable[..., Any]) -> inspect.Signature | None:
    """The signature, or None where a callable tells none."""
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return None


def bind_call(
    signature: inspect.Signature | None, argnums: Argnums, args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> BoundCall:  # fmt: skip
    """Bind the arguments of one call.

    Arguments passed by keyword become positional ones, as far as no default stands between. The
    others (keyword-only ones, and those after a parameter left to its default) keep their names;
    argument numbers mean positions in the signature either way.

    Raises:
      TypeError: the arguments do not fit the signature, or a static one is not hashable.
      StepError: an argument number names no argument.
    """
    if kwargs and signature is not None:
        bound = signature.bind(*args, **kwargs)
        args, kwargs = bound.args, bound.kwargs
    parameters = [] if signature is None else list(signature.parameters.values())
    positional = [p.name for p in parameters if p.kind in _POSITIONAL]
    keywords = tuple(sorted(kwargs))
    first = [positional[i] if i < len(positional) else f"arg{i}" for i in range(len(args))]
    values = (*args, *(kwargs[k] for k in keywords))

    def positions(kind: str, numbers: Sequence[int]) -> tuple[int, ...]:
        found: dict[int, None] = {}
        for number in numbers:
            at = number + len(args) if number < 0 else number
            named = 0 <= at < len(positional) and at >= len(args)
            if 0 <= at < len(args):
                found[at] = None
            elif named and positional[at] in keywords:
                found[len(args) + keywords.index(positional[at])] = None
            elif not (named and kind == "static"):  # a static one may be left to its default
                raise StepError(
                    f"{kind}_argnums names argument {number}, but the step was called with "
                    f"{len(args)} arguments, counted from 0"
                )
        return tuple(found)

    names = (*first, *keywords)
    named = (names.index(name) for name in argnums.static_names if name in names)
    static = tuple(dict.fromkeys((*positions("static", argnums.static), *named)))
    call = BoundCall(
        values, names, len(args), static, positions("batch", argnums.batch),
        positions("donate", argnums.donate),
    )  # fmt: skip
    for kind, numbers in (("batch", call.batch), ("donate", call.donate)):
        for i in numbers:
            if i in call.static:
                raise StepError(f"argument {i} cannot be both static and in {kind}_argnums")
    for i in call.static:
        _check_hashable(i, call)
    return call


def _check_hashable(position: int, call: BoundCall) -> None:
    value = call.values[position]
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            "a static argument must be hashable, since every value of it is a program of its own: "
            f"argument {position} ({call.names[position]}) is {value!r:.80}, of type "
            f"{type(value).__name__}. Pass a hashable value, such as a tuple for a list, or take "
            "it out of static_argnums and static_argnames."
        ) from None


def _path_text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
