"""Published measurements of train steps: `benchmarks/data/published.csv`, and files like it.

The columns are described in docs/published-data.md; files are checked field by field when read.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "published.csv"
MAX_FILE_BYTES = 32 * 2**20
MAX_TEXT = 2000

REMATS = ("", "none", "selective", "full")
ATTENTIONS = ("mha", "mla")
ORIGINS = ("measured", "derived")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """One published train step; None where a source does not say.

    Attributes are the columns: see docs/published-data.md.
    """

    id: str
    source: str
    url: str
    system: str
    accelerator: str
    num_hosts: int
    devices_per_host: int
    nic_gbit_per_s: float | None
    precision: str
    framework: str
    model: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None
    mlp_size: int
    gated_mlp: bool
    tied_embeddings: bool
    vocab_size: int
    attention: str
    num_experts: int | None
    experts_per_token: int | None
    expert_size: int | None
    shared_expert_size: int | None
    num_dense_layers: int | None
    fused_attention: bool
    seq_len: int
    global_batch: int
    microbatch: int | None
    dp: int
    tp: int
    pp: int
    virtual_stages: int
    cp: int
    ep: int
    zero: int | None
    sequence_parallel: bool | None
    remat: str
    schedule: str
    step_s: float
    step_origin: str
    tflops_per_device: float | None
    flops_convention: str
    mfu: float | None
    hfu: float | None
    memory_gib: float | None
    memory_kind: str
    notes: str

    @property
    def num_devices(self) -> int:
        """All devices."""
        return self.num_hosts * self.devices_per_host

    @property
    def publisher(self) -> str:
        """The source without file and version."""
        return self.source.split("@")[0]


class PublishedDataError(ValueError):
    """A field of a data file cannot be used."""


# Columns with numbers: lowest and highest value, and whether it must be whole.
_NUMBERS: Mapping[str, tuple[float, float, bool]] = {
    **dict.fromkeys(
        ("num_hosts", "devices_per_host", "dp", "tp", "pp", "virtual_stages", "cp", "ep"),
        (1, 1e6, True),
    ),
    **dict.fromkeys(("num_layers", "num_heads", "num_kv_heads", "head_dim"), (1, 1e5, True)),
    **dict.fromkeys(
        ("hidden_size", "mlp_size", "vocab_size", "expert_size", "shared_expert_size"),
        (1, 1e8, True),
    ),
    **dict.fromkeys(("num_experts", "experts_per_token"), (1, 1e5, True)),
    **dict.fromkeys(("seq_len", "global_batch", "microbatch"), (1, 1e9, True)),
    "num_dense_layers": (0, 1e5, True),
    "zero": (0, 3, True),
    "nic_gbit_per_s": (0.1, 1e5, False),
    "step_s": (1e-6, 1e7, False),
    "tflops_per_device": (0, 1e5, False),
    "mfu": (0, 1, False),
    "hfu": (0, 1.5, False),
    "memory_gib": (0, 1e5, False),
}
_FLAGS = ("gated_mlp", "tied_embeddings", "fused_attention", "sequence_parallel")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "remat": REMATS,
    "attention": ATTENTIONS,
    "step_origin": ORIGINS,
}
_MAY_BE_EMPTY = ("url", "system", "framework", "schedule", "flops_convention", "memory_kind",
                 "notes", "remat")  # fmt: skip


def load_published(path: Path = DATA) -> tuple[PublishedRow, ...]:
    """Read and check a data file.

    Raises:
      PublishedDataError: names the row, the column, what was found and what is allowed.
    """
    try:
        raw = path.read_bytes()[: MAX_FILE_BYTES + 1]
    except OSError as error:
        raise PublishedDataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise PublishedDataError(f"{path}: more than {MAX_FILE_BYTES} bytes, which is the limit")
    try:
        table = list(csv.reader(raw.decode("utf-8").splitlines(), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise PublishedDataError(f"{path}: no table of comma-separated values: {error}") from None
    if not table:
        raise PublishedDataError(f"{path}: empty; the first line names the columns")
    columns = _check_columns(path, table[0])
    rows = [_row(path, number, columns, cells) for number, cells in enumerate(table[1:], start=2)]
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        if row.id in seen:
            raise PublishedDataError(
                f"{path}: row {number}: id: found {row.id!r} again, as in row {seen[row.id]}"
            )
        seen[row.id] = number
    return tuple(rows)


def _check_columns(path: Path, found: Sequence[str]) -> tuple[str, ...]:
    known = tuple(field.name for field in fields(PublishedRow))
    for problem, names in (
        ("unknown", [name for name in found if name not in known]),
        ("missing", [name for name in known if name not in found]),
        ("repeated", [name for name in known if list(found).count(name) > 1]),
    ):
        if names:
            raise PublishedDataError(
                f"{path}: row 1: {problem} column {names[0][:60]!r}; the columns are "
                f"{', '.join(known)}"
            )
    return tuple(found)


def _row(path: Path, number: int, columns: Sequence[str], cells: Sequence[str]) -> PublishedRow:
    if len(cells) != len(columns):
        raise PublishedDataError(
            f"{path}: row {number}: found {len(cells)} cells, allowed {len(columns)}"
        )

    def error(column: str, found: str, allowed: str) -> PublishedDataError:
        return PublishedDataError(
            f"{path}: row {number}: {column}: found {found[:60]!r}, allowed {allowed}"
        )

    optional = {field.name for field in fields(PublishedRow) if "None" in str(field.type)}
    values: dict[str, Any] = {}
    for column, cell in zip(columns, cells, strict=True):
        text = cell.strip()
        if not text and column in optional:
            values[column] = None
        elif column in _NUMBERS:
            values[column] = _number(text, *_NUMBERS[column])
            if values[column] is None:
                low, high, whole = _NUMBERS[column]
                kind = "a whole number" if whole else "a number"
                empty = " or nothing" if column in optional else ""
                raise error(column, text, f"{kind} from {low:g} to {high:g}{empty}")
        elif column in _FLAGS:
            if text not in ("0", "1"):
                raise error(column, text, "0 or 1")
            values[column] = text == "1"
        elif column in _CHOICES:
            if text not in _CHOICES[column]:
                raise error(column, text, " or ".join(map(repr, _CHOICES[column])))
            values[column] = text
        elif (
            len(text) > MAX_TEXT or not text.isprintable() or not (text or column in _MAY_BE_EMPTY)
        ):
            raise error(column, text, f"printable text of at most {MAX_TEXT} characters")
        else:
            values[column] = text
    row = PublishedRow(**values)
    grid = row.dp * row.tp * row.pp * row.cp
    if grid != row.num_devices:
        raise error(
            "dp", str(row.dp), f"{row.num_devices} devices / (tp x pp x cp), as dp x tp x pp x cp "
            f"is {grid}",
        )  # fmt: skip
    if row.hidden_size % row.num_heads and row.head_dim is None:
        raise error("num_heads", str(row.num_heads), f"a divisor of hidden_size {row.hidden_size}")
    if row.num_experts and not (row.experts_per_token and row.expert_size):
        raise error("num_experts", str(row.num_experts), "experts_per_token and expert_size too")
    return row


def _number(text: str, low: float, high: float, whole: bool) -> float | None:
    """The number, or None if it is none within the range."""
    try:
        found = float(text)
    except ValueError:
        return None
    if not (math.isfinite(found) and low <= found <= high) or (whole and found != int(found)):
        return None
    return int(found) if whole else found
