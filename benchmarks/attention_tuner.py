"""Finds block sizes of the Hopper attention kernels; the offline half of `block_sizes.py`.

    python -m benchmarks.attention_tuner [--only 128-causal]

For each head dim and mask class all candidates are lowered, which drops those that do not fit
shared memory; on a Hopper GPU the rest are checked against the defaults and timed in turns, forward
and backward. Prints the rows to put into `MEASURED` and writes
`results/attention_tuner_<device kind>.json`. Without such a GPU it prints the candidates and ends.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from alpa_lite.runtime.kernels.flash import hopper
from alpa_lite.runtime.kernels.flash.block_sizes import (
    CAUSAL,
    DEFAULTS,
    FULL,
    FUSED,
    HEAD_DIMS,
    SPLIT,
    WINDOW,
    BackwardBlocks,
    Blocks,
    ForwardBlocks,
)
from alpa_lite.runtime.kernels.flash.choice import HOPPER, cuda_device
from alpa_lite.runtime.kernels.flash.hopper_dkv import FUSED_DIM
from alpa_lite.runtime.kernels.flash.spec import FlashSpec
from benchmarks.attention import results_name
from benchmarks.attention_variants import BACKWARD, FORWARD, Problem, Timed, interleaved_s
from benchmarks.options import parse_options
from benchmarks.results_table import Column, ResultsTable, describe_environment

SEQ = 4096
WINDOW_SIZE = 1024
TOLERANCE = 1e-2  # between two choices of blocks, relative L2; rounding differs, mistakes show
ROUNDS = 7
ROUND_S = 0.01
CASES = tuple((dim, mask) for dim in HEAD_DIMS for mask in (CAUSAL, FULL, WINDOW))


def main() -> None:
    options = parse_options(__doc__, [f"{dim}-{mask}" for dim, mask in CASES])
    has_gpu = any(device.platform == "gpu" for device in jax.devices())
    kind, capability = cuda_device()
    rows = []
    for dim, mask in CASES:
        if f"{dim}-{mask}" not in options.chosen:
            continue
        problem, spec = problem_of(dim, mask)
        for which in (FORWARD, BACKWARD):
            fitting = [b for b in candidates(dim, which) if lowers(spec, problem, b, which)]
            print(f"{dim} {mask} {which}: {len(fitting)} candidates", *fitting, sep="\n  ")
            if has_gpu and capability == HOPPER:
                rows += tune(spec, problem, mask, which, fitting)
    if not rows:
        print("Nothing was timed: that takes a Hopper GPU.")
        return
    for row in rows:
        if row["best"]:
            print(row)
    if options.save:
        _table(kind, rows).save(results_name(kind).replace("attention", "attention_tuner"))


def problem_of(dim: int, mask: str) -> tuple[Problem, FlashSpec]:
    """What is timed, by the benchmark's convention and the kernels'."""
    window = WINDOW_SIZE if mask == WINDOW else None
    width = dim * max(1, 2048 // dim)
    problem = Problem(seq=SEQ, head_dim=dim, causal=mask != FULL, window=window, width=width)
    return problem, FlashSpec(
        scale=problem.scale,
        left=None if window is None else window - 1,
        right=None if mask == FULL else 0,
    )


def candidates(dim: int, which: str) -> Iterator[Blocks]:
    """Block sizes worth a try; the defaults come first."""
    default = DEFAULTS[dim]
    yield default
    tried = {default}
    for block_kv in (64, 128, 192):
        for stages in (1, 2, 3, 4):
            forward = ForwardBlocks(block_kv=block_kv, stages=stages)
            kinds = (SPLIT, FUSED) if dim == FUSED_DIM else (SPLIT,)
            for kind in kinds if which == BACKWARD else ():
                for dkv_stages in (1, 2, 3):
                    backward = BackwardBlocks(
                        kind=kind, dq_block_kv=block_kv, dq_stages=stages, dkv_stages=dkv_stages
                    )
                    if kind == FUSED:  # it has no dq kernel
                        backward = replace(
                            backward, dq_block_kv=default.backward.dq_block_kv, dq_stages=1
                        )
                    blocks = replace(default, backward=backward)
                    if blocks not in tried:
                        tried.add(blocks)
                        yield blocks
            blocks = replace(default, forward=forward)
            if which == FORWARD and blocks not in tried:
                tried.add(blocks)
                yield blocks


def lowers(spec: FlashSpec, problem: Problem, blocks: Blocks, which: str) -> bool:
    """Whether Mosaic takes them; on a CPU too."""
    arguments = jax.eval_shape(lambda: operands(problem, which))
    function = jax.jit(functools.partial(_function(which), spec, blocks=blocks))
    try:
        function.trace(*arguments).lower(lowering_platforms=("cuda",))
    except (ValueError, NotImplementedError):
        return False
    return True


def operands(problem: Problem, which: str) -> tuple[Any, ...]:
    """Of `hopper.forward` or `hopper.backward`; log-sum-exp such that probabilities are small."""
    q, k, v, dout = problem.arrays()
    offset = jnp.zeros(problem.batch, jnp.int32)
    if which == FORWARD:
        return q, k, v, offset, offset
    rows = jnp.full((problem.batch, problem.heads, problem.seq), 8.0, jnp.float32)
    return q, k, v, rows, jnp.zeros_like(rows), dout, offset, offset


def tune(
    spec: FlashSpec, problem: Problem, mask: str, which: str, fitting: list[Blocks]
) -> list[dict[str, Any]]:
    """A row for each candidate that gives what the first one gives."""
    arguments = operands(problem, which)
    programs: dict[str, Timed] = {}
    expected = None
    for blocks in fitting:
        started = time.perf_counter()
        function = jax.jit(functools.partial(_function(which), spec, blocks=blocks))
        timed = Timed(function.lower(*arguments).compile(), arguments)
        found = timed()
        expected = found if expected is None else expected
        if max(map(_distance, found, expected)) > TOLERANCE:
            print(f"WRONG: {blocks}", flush=True)
            continue
        shown = str(blocks.forward if which == FORWARD else blocks.backward)
        programs[shown] = timed
        print(f"  compiled in {time.perf_counter() - started:.1f} s: {shown}", flush=True)
    times_s = interleaved_s(programs, ROUNDS, ROUND_S)
    best = min(times_s, key=lambda shown: times_s[shown])
    return [
        {
            "head_dim": problem.head_dim, "mask": mask, "pass": which, "blocks": shown,
            "tflops": problem.flops(which) / t / 1e12, "best": shown == best,
        }
        for shown, t in times_s.items()
    ]  # fmt: skip


def _function(which: str) -> Any:
    return hopper.forward if which == FORWARD else hopper.backward


def _distance(one: Any, other: Any) -> float:
    one, other = one.astype(jnp.float32).ravel(), other.astype(jnp.float32).ravel()
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))


def _table(device_kind: str, rows: list[dict[str, Any]]) -> ResultsTable:
    return ResultsTable(
        title="Block sizes of the Hopper attention kernels, bfloat16, sequence 4096",
        command="python -m benchmarks.attention_tuner",
        environment=describe_environment(device_kind),
        columns=(
            Column("head_dim", "Head dim"),
            Column("mask", "Mask"),
            Column("pass", "Pass"),
            Column("blocks", "Blocks"),
            Column("tflops", "TFLOP/s", ".0f"),
            Column("best", "Best"),
        ),
        rows=tuple(rows),
    )


if __name__ == "__main__":
    main()
