"""Options that several verbs share, and the values their texts stand for."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from alpa_lite.cli.exits import InputError
from alpa_lite.passes.methods import (
    AutoParallel,
    DataParallel,
    MeshShape,
    Method,
    ShardParallel,
    Zero1Parallel,
    Zero2Parallel,
    Zero3Parallel,
)
from alpa_lite.passes.pipeline_methods import PipeshardParallel, ThreeDParallel


class MethodName(StrEnum):
    """What `--method` may say."""

    AUTO = "auto"
    SHARD = "shard"
    DATA = "data"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"
    PIPELINE = "pipeline"
    GRID = "3d"


METHODS: dict[MethodName, type[Method]] = {
    MethodName.AUTO: AutoParallel,
    MethodName.SHARD: ShardParallel,
    MethodName.DATA: DataParallel,
    MethodName.ZERO1: Zero1Parallel,
    MethodName.ZERO2: Zero2Parallel,
    MethodName.ZERO3: Zero3Parallel,
    MethodName.PIPELINE: PipeshardParallel,
}

PlanArgument = Annotated[
    Path, typer.Argument(metavar="PLAN", help="A file made by `alpa-lite plan -o`.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
MethodOption = Annotated[
    MethodName,
    typer.Option(
        help="auto searches all layouts; pipeline searches pipeline stages too; 3d is a fixed grid "
        "given by --mesh dp=2,tp=4,pp=2; shard searches layouts on one mesh; the others are fixed "
        "recipes, priced alike."
    ),
]
MicrobatchesOption = Annotated[
    str,
    typer.Option(
        metavar="N|auto", help="Gradient accumulation steps; auto takes the fewest that fit."
    ),
]
MeshOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES",
        help="Fix the logical mesh, slowest links first: 2,4 or dp=2,tp=4. Searched if left out.",
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        "--budget",
        metavar="SIZE",
        help="Memory per device, such as 40GiB or 800MB; what the cluster has if left out.",
    ),
]
ScheduleOption = Annotated[
    str | None,
    typer.Option(
        help="Of a pipeline: gpipe, 1f1b, eager_1f1b, interleaved_1f1b, zb-h1, zbv, chimera, "
        "dualpipe, dualpipev or auto."
    ),
]
RematOption = Annotated[
    str | None,
    typer.Option(help="What a pipeline's backward pass computes again: none, dots, full or auto."),
]
OptimizerOption = Annotated[
    str | None, typer.Option(help="Of a model preset: adamw (default), sgd, adafactor or lion.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting: of a model preset (model.num_layers=4, or num_layers=4), of the "
        "hardware (cluster.hosts=2, cluster.inter_host.bytes_per_s=5e9), or an option "
        "(batch_size=64); repeatable.",
    ),
]
PinOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="PATH=SPEC",
        help="Prescribe the layout of inputs, such as 'state.params.*.up.kernel=P(None,\"tp\")'; "
        "the rest is searched; repeatable.",
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="TARGET",
        help="The package.module:factory that the plan was made from: code named in a file is not "
        "run unless you name it too.",
    ),
]

_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([kmgt]i?b|b)?", re.IGNORECASE)
_POWERS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def make_method(
    name: MethodName, *, microbatches: str = "auto", mesh: str | None = None,
    memory_budget: str | None = None, schedule: str | None = None, remat: str | None = None,
) -> Method:  # fmt: skip
    """The method that these option texts describe.

    Raises:
      InputError: one of them means nothing.
    """
    shape = None if mesh is None else parse_mesh(mesh)
    options: dict[str, Any] = {
        "num_microbatches": parse_microbatches(microbatches),
        "memory_budget_bytes": None if memory_budget is None else parse_bytes(memory_budget),
    }
    given = {"schedule": schedule, "remat": remat}
    staged: dict[str, Any] = {key: text for key, text in given.items() if text is not None}
    if staged and name not in (MethodName.PIPELINE, MethodName.GRID):
        raise InputError(f"--{next(iter(staged))} is for --method pipeline and --method 3d only")
    try:
        if name == MethodName.GRID:
            return ThreeDParallel(**_grid(shape), **options, **staged)
        if name == MethodName.PIPELINE:
            if shape is not None:
                raise InputError("--mesh fixes the grid of --method 3d; pipeline searches it")
            return PipeshardParallel(**options, **staged)
        return METHODS[name](mesh_shape=shape, **options)
    except ValueError as error:
        raise InputError(str(error)) from None


def _grid(shape: MeshShape | None) -> dict[str, Any]:
    """Sizes of dp, tp and pp, of which those left out are 1."""
    names = ("dp", "tp", "pp")
    if not isinstance(shape, Mapping) or not set(shape) <= set(names):
        raise InputError("--method 3d needs --mesh with sizes of dp, tp and pp: dp=2,tp=4,pp=2")
    return {name: shape.get(name, 1) for name in names}


def parse_microbatches(text: str) -> int | Literal["auto"]:
    """`auto` or a positive number."""
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise InputError(f"--num-microbatches {text!r} is neither a positive number nor auto")
    return int(text)


def parse_mesh(text: str) -> MeshShape:
    """`2,4` as sizes, `dp=2,tp=4` as sizes by axis name."""
    form = "sizes such as 2,4 or named sizes such as dp=2,tp=4"
    pairs = [part.strip().rpartition("=") for part in text.split(",")]
    sizes = [size.strip() for _, _, size in pairs]
    names = [name.strip() for name, _, _ in pairs]
    if not all(size.isascii() and size.isdecimal() and int(size) >= 1 for size in sizes):
        raise InputError(f"--mesh {text!r} is not {form}")
    if not any(names):
        return tuple(map(int, sizes))
    if not all(name.isidentifier() for name in names) or len(set(names)) < len(names):
        raise InputError(f"--mesh {text!r} is not {form}: names must be distinct identifiers")
    return dict(zip(names, map(int, sizes), strict=True))


def parse_bytes(text: str) -> float:
    """`40GiB`, `800 MB` or a plain number of bytes; GB is 10^9 bytes and GiB is 2^30."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a size such as 40GiB, 800MB or 500000000")
    unit = (match[2] or "").lower()
    found = float(match[1]) * (1024 if "i" in unit else 1000) ** _POWERS[unit[:1]]
    if not 0 < found < math.inf:
        raise InputError(f"{text!r} is not a positive size")
    return found


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs; values are numbers, true, false, none, tuples, and text otherwise."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not all(map(str.isidentifier, key.split("."))):
            raise InputError(f"--set {text!r} has not the form KEY=VALUE")
        if key in found:
            raise InputError(f"--set gives {key} twice")
        found[key] = _parse_value(value.strip())
    return found


def _parse_value(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
