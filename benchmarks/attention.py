"""Attention on a GPU: `flash_attention` against cuDNN, XLA, JAX's Pallas kernel and tokamax.

    python -m benchmarks.attention [--quick] [--only 128-causal-4096]

Correctness first: every implementation against float32, whatever misses the tolerances is not
timed. Then forward and backward passes, all implementations of a problem in turns, on random data.
Takes under 10 minutes: what is not done by then is left out. Writes
`results/attention_<device kind>.json` after every problem. Without a GPU it says so and ends.
"""

from __future__ import annotations

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from benchmarks.attention_variants import (
    FORWARD,
    PASSES,
    VARIANTS,
    Problem,
    Timed,
    errors,
    interleaved_s,
    prepare,
)
from benchmarks.options import parse_options
from benchmarks.results_table import Column, ResultsTable, describe_environment

DEADLINE_S = 540
TOLERANCE = (4e-3, 6e-3)  # of output and gradients, as in the tests
COMPILERS = 8  # threads
ROUNDS = 10
ROUND_S = 0.01

PROBLEMS = (
    Problem(seq=4096, head_dim=128),
    *(
        Problem(seq=seq, head_dim=dim, causal=causal)
        for dim in (128, 64, 256)
        for causal in (True, False)
        for seq in (1024, 4096, 16384)
        if (dim, causal, seq) != (128, True, 4096)
    ),
    Problem(seq=4096, head_dim=128, group=4, width=4096),
    Problem(seq=16384, head_dim=128, window=1024),
)
CHECKED = (
    Problem(seq=1024, head_dim=128, tokens=1024, group=4),
    Problem(seq=1024, head_dim=64, tokens=1024, causal=False),
    Problem(seq=1024, head_dim=128, tokens=1024, window=200),
    Problem(seq=1024, head_dim=256, tokens=1024),
)


def main() -> None:
    options = parse_options(__doc__, [problem.name for problem in PROBLEMS])
    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"There is no GPU here ({device.device_kind}): nothing to measure.")
        sys.exit(0)
    started = time.monotonic()
    right = check(CHECKED)
    rows: list[dict[str, Any]] = []
    for problem in (p for p in PROBLEMS if p.name in options.chosen):
        if time.monotonic() - started > DEADLINE_S:
            print(f"out of time before {problem.name}")
            break
        rows += measure(problem, right)
        if options.save:
            _table(device.device_kind, rows).save(results_name(device.device_kind))
    print(_table(device.device_kind, rows).to_markdown())


def results_name(device_kind: str) -> str:
    """Of the results file."""
    return "attention_" + re.sub(r"\W+", "-", device_kind.lower())


def check(problems: tuple[Problem, ...]) -> list[str]:
    """Names of the implementations that are right on all problems that they take at all."""
    wrong = set()
    for problem in problems:
        for name, make in VARIANTS.items():
            try:
                found = errors(make(problem), problem)
            except Exception as error:  # noqa: BLE001 (others' kernels fail in their own ways)
                print(f"{problem.name}: {name} cannot: {_first_line(error)}", flush=True)
                wrong |= {name} if name == "ours" else set()
                continue
            print(f"{problem.name}: {name} off by {found[0]:.1e}, gradients by {found[1]:.1e}")
            if not (found[0] <= TOLERANCE[0] and found[1] <= TOLERANCE[1]):
                wrong.add(name)
    if wrong:
        print(f"not timed, since wrong: {', '.join(sorted(wrong))}", flush=True)
    return [name for name in VARIANTS if name not in wrong]


def measure(problem: Problem, names: list[str]) -> list[dict[str, Any]]:
    """A row for each pass: TFLOP/s of each implementation."""
    jobs = [(name, which) for which in PASSES for name in names]
    with ThreadPoolExecutor(COMPILERS) as pool:
        programs = dict(zip(jobs, pool.map(lambda job: _prepare(problem, *job), jobs), strict=True))
    rows = []
    for which in PASSES:
        ready = {name: p for name in names if (p := programs[name, which]) is not None}
        times_s = interleaved_s(ready, ROUNDS, ROUND_S)
        speed = {name: problem.flops(which) / t / 1e12 for name, t in times_s.items()}
        row = {
            "head_dim": problem.head_dim, "mask": problem.mask, "seq": problem.seq,
            "heads": f"{problem.heads}/{problem.heads // problem.group}", "batch": problem.batch,
            "pass": which, **speed,
        }  # fmt: skip
        if "ours" in speed and "cudnn" in speed:
            row["ratio"] = speed["ours"] / speed["cudnn"]
        print(row, flush=True)
        rows.append(row)
    return rows


def _prepare(problem: Problem, name: str, which: str) -> Timed | None:
    try:
        return prepare(VARIANTS[name](problem), problem, which)
    except Exception as error:  # noqa: BLE001 (others' kernels fail in their own ways)
        if which == FORWARD:
            print(f"{problem.name}: {name} cannot: {_first_line(error)}", flush=True)
        return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _table(device_kind: str, rows: list[dict[str, Any]]) -> ResultsTable:
    return ResultsTable(
        title="Attention in TFLOP/s, bfloat16; medians of 10 turns, all implementations in turns",
        command="python -m benchmarks.attention",
        environment=describe_environment(device_kind),
        columns=(
            Column("head_dim", "Head dim"),
            Column("mask", "Mask"),
            Column("seq", "Sequence"),
            Column("heads", "Heads (q/kv)"),
            Column("batch", "Batch"),
            Column("pass", "Pass"),
            Column("ours", "alpa-lite", ".0f"),
            Column("cudnn", "cuDNN", ".0f"),
            Column("xla", "XLA", ".0f"),
            Column("pallas", "Pallas of JAX", ".0f"),
            Column("tokamax", "tokamax", ".0f"),
            Column("ratio", "alpa-lite / cuDNN", ".2f"),
        ),
        rows=tuple(rows),
    )


if __name__ == "__main__":
    main()
