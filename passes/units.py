"""Bytes and seconds as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence

_BYTE_UNITS = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0))
_TIME_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def format_bytes(num_bytes: float) -> str:
    """Three digits and a binary unit: `1.50 GiB`."""
    return _with_unit(num_bytes, _BYTE_UNITS)


def format_seconds(seconds: float) -> str:
    """Three digits and a unit: `12.3 ms`."""
    return _with_unit(seconds, _TIME_UNITS)


def _with_unit(value: float, units: Sequence[tuple[str, float]]) -> str:
    name, size = next((unit for unit in units if value >= unit[1]), units[-1])
    scaled = value / size
    decimals = 0 if scaled == int(scaled) < 1000 else 2 if scaled < 10 else 1 if scaled < 100 else 0
    return f"{scaled:.{decimals}f} {name}"
