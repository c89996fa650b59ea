"""What a benchmark is told on the command line: which of its cases to run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Options:
    """A parsed command line.

    Attributes:
      chosen: names of the cases to run, in the order of the benchmark.
      quick: whether to be done soon.
      save: whether the results stand for all cases and are to be kept.
      more: values of the benchmark's own options, by name; None for those not given.
    """

    chosen: tuple[str, ...]
    quick: bool
    save: bool
    more: dict[str, Any]


def parse_options(
    description: str | None, cases: Sequence[str], *, arguments: Sequence[str] | None = None,
    **more: str,
) -> Options:  # fmt: skip
    """Parse the arguments of a benchmark; leaves the program if they are wrong.

    Args:
      description: of the benchmark.
      cases: names of all of its cases.
      arguments: the command line's by default.
      **more: help text of each further option, which takes a value.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first case only; nothing saved")
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", help="these cases only; nothing saved", default=[]
    )
    for name, text in more.items():
        parser.add_argument(f"--{name}", help=text)
    found = parser.parse_args(arguments)
    unknown = [name for name in found.only if name not in cases]
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; the cases are {', '.join(cases)}")
    chosen = [name for name in cases if not found.only or name in found.only]
    return Options(
        chosen=tuple(chosen[:1] if found.quick else chosen), quick=found.quick,
        save=not (found.quick or found.only),
        more={name: getattr(found, name) for name in more},
    )  # fmt: skip
