"""The shape of a plan file, and a checker that says what is wrong where."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alpa_lite.errors import PlanError
from alpa_lite.passes.memory import CATEGORIES


@dataclass(frozen=True, slots=True)
class Text:
    """A string; one of `allowed` if given."""

    allowed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number of at least `low`; `integer` forbids fractions."""

    low: float = 0.0
    integer: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list whose items have one shape; `length` if fixed."""

    item: Any
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A list of exactly these items."""

    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class MapOf:
    """An object with any keys."""

    item: Any


@dataclass(frozen=True, slots=True)
class Scalar:
    """Text, a finite number, true, false, null, or a list of these."""


@dataclass(frozen=True, slots=True)
class Optional:
    """A field that files written before it existed do not have."""

    item: Any


@dataclass(frozen=True, slots=True)
class Unchecked:
    """Checked elsewhere."""


_MAX_NUMBER = 1e300
"""JSON has integers of any size; beyond this, arithmetic with floats overflows."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60

_SPEC = ListOf(ListOf(Text()))
_COUNT = Number(1, integer=True)

PLAN: Mapping[str, Any] = {
    "format": Text(("alpa-lite-plan",)),
    "version": Number(1, integer=True),
    "name": Text(),
    "method": Text(),
    "mesh": ListOf(Pair((Text(), _COUNT))),
    "num_microbatches": _COUNT,
    "memory_budget_bytes": Number(),
    "graph_hash": Text(),
    "predicted": {
        "step_s": Number(),
        "compute_s": Number(),
        "communication_s": Number(),
        "memory_bytes": {name: Number() for name in CATEGORIES},
        "peak_bytes": Number(),
        "peak_at": Text(),
        "collectives": ListOf(
            {
                "kind": Text(("all_reduce", "all_gather", "reduce_scatter", "all_to_all")),
                "axes": ListOf(Text()),
                "bytes_per_step": Number(),
                "times_per_step": Number(),
                "seconds_per_step": Number(),
            }
        ),
    },
    "solve": {
        "status": Text(("optimal", "within_gap", "time_limit", "unproven", "given")),
        "objective_s": Number(),
        "lower_bound_s": Number(),
        "gap": Number(),
        "solver": Text(),
        "wall_s": Number(),
        "num_decisions": Number(0, integer=True),
        "num_strategies": Number(0, integer=True),
    },
    "inputs": MapOf(_SPEC),
    "pins": MapOf(Text()),
    "decisions": ListOf(
        {"name": Text(), "count": _COUNT, "factors": MapOf(_COUNT), "axes": MapOf(Text())}
    ),
    "alternatives": ListOf(
        {
            "mesh": ListOf(_COUNT),
            "num_microbatches": _COUNT,
            "step_s": Number(optional=True),
            "reason": Text(),
        }
    ),
    "notes": ListOf(Text()),
    "versions": MapOf(Text()),
    "configuration": Optional(MapOf(Scalar())),
    "cluster": Unchecked(),
}


def check(data: Any, shape: Any, where: str) -> None:
    """Compare data with a shape.

    Raises:
      PlanError: names the field, what it holds and what is allowed.
    """
    if isinstance(shape, Mapping):
        _check_object(data, shape, where)
    elif isinstance(shape, MapOf):
        _expect(isinstance(data, dict), data, "an object", where)
        for key, item in data.items():
            check(item, shape.item, f"{where}: {key}")
    elif isinstance(shape, ListOf):
        _expect(isinstance(data, list), data, "a list", where)
        for i, item in enumerate(data):
            check(item, shape.item, f"{where}[{i}]")
    elif isinstance(shape, Pair):
        fits = isinstance(data, list) and len(data) == len(shape.items)
        _expect(fits, data, f"a list of {len(shape.items)}", where)
        for i, (item, each) in enumerate(zip(data, shape.items, strict=True)):
            check(item, each, f"{where}[{i}]")
    elif isinstance(shape, Text):
        _expect(isinstance(data, str), data, "text", where)
        if shape.allowed:
            _expect(data in shape.allowed, data, f"one of {list(shape.allowed)}", where)
    elif isinstance(shape, Number):
        _check_number(data, shape, where)
    elif isinstance(shape, Scalar):
        _check_scalar(data, where)
    elif isinstance(shape, Optional):
        check(data, shape.item, where)


def _check_object(data: Any, shape: Mapping[str, Any], where: str) -> None:
    _expect(isinstance(data, dict), data, "an object", where)
    needed = {key for key, each in shape.items() if not isinstance(each, Optional)}
    missing = sorted(needed - set(data))
    if missing:
        raise PlanError(f"{where}: the field {missing[0]!r} is missing")
    unknown = sorted(set(data) - set(shape))
    if unknown:
        raise PlanError(f"{where}: unknown field {unknown[0]!r}; known are {sorted(shape)}")
    for key, each in shape.items():
        if key in data:
            check(data[key], each, f"{where}: {key}")


def _check_number(data: Any, shape: Number, where: str) -> None:
    if data is None and shape.optional:
        return
    kinds = (int,) if shape.integer else (int, float)
    kind = "a whole number" if shape.integer else "a finite number"
    fits = isinstance(data, kinds) and not isinstance(data, bool)
    fits = fits and shape.low <= data <= _MAX_NUMBER  # false for NaN
    _expect(fits, data, f"{kind} of at least {shape.low:g}", where)


def _check_scalar(data: Any, where: str) -> None:
    for each in data if isinstance(data, list) else [data]:
        if isinstance(each, bool) or not isinstance(each, int | float):
            wanted = "text, a number, true, false, null, or a list of these"
            _expect(each is None or isinstance(each, bool | str), data, wanted, where)
        else:
            check(each, Number(-_MAX_NUMBER), where)


def _expect(fits: bool, data: Any, wanted: str, where: str) -> None:
    if not fits:
        raise PlanError(f"{where}: expected {wanted}, found {_SHORT.repr(data)[:60]}")
