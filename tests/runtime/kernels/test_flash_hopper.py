"""The Hopper kernels without a GPU: interpreted on threads, and lowered for one."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import pytest

from alpa_lite import compat, flash_attention
from alpa_lite.runtime.kernels.flash import hopper
from alpa_lite.runtime.kernels.flash.block_sizes import (
    CAUSAL,
    DEFAULTS,
    FULL,
    HEAD_DIMS,
    SEGMENTS,
    WINDOW,
    blocks_for,
    mask_class,
    supported_head_dim,
)
from alpa_lite.runtime.kernels.flash.spec import FlashSpec
from benchmarks.attention_lowering import SEMANTICS, configurations, lower
from tests.import_graph import ROOT

PROGRAM = Path(__file__).with_name("interpret_flash.py")
TIMEOUT_S = 240  # a hundred times what a case takes on an idle core is a hang


def interpret(*arguments):
    """Lines that the program printed, and None instead if it hung."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *arguments], env=environment, capture_output=True,
            text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    return [*done.stdout.split("\n"), done.stderr[-2000:]]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["causal", "masks", "unseen", "wide", "fused"])
def test_interpreted(case):
    assert interpret(case)[:2] == ["no races", "correct"]


@pytest.mark.slow
def test_a_missing_barrier_is_found():
    lines = interpret("fused", "planted")
    assert lines is None or "races" in lines


# Lowering. Layouts, shapes of products and the size of shared memory are checked there.


def small_share():
    """Every kernel form once, and both lowering semantics."""
    wanted = {(64, CAUSAL, "Lane"), (128, SEGMENTS, "Warpgroup"), (256, WINDOW, "Lane")}
    return [c for c in configurations() if (c.head_dim, c.mask, c.semantics) in wanted and c.cheap]


@pytest.mark.smoke
@pytest.mark.parametrize("configuration", small_share(), ids=str)
def test_lowers_for_cuda(configuration):
    assert lower(configuration) == configuration.kernels


@pytest.mark.slow
@pytest.mark.parametrize("configuration", configurations()[::15], ids=str)
def test_configurations_lower_for_cuda(configuration):
    assert lower(configuration) == configuration.kernels


def test_public_function_lowers_to_the_kernels():
    x = jax.ShapeDtypeStruct((1, 200, 2, 72), "bfloat16")

    def loss(q, k, v):
        return flash_attention(q, k, v, causal=True).astype("float32").sum()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    text = step.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 3


def test_too_large_tiles_are_refused_when_lowered():
    from dataclasses import replace

    blocks = DEFAULTS[256]
    blocks = replace(blocks, forward=replace(blocks.forward, block_kv=128, stages=3))
    x = jax.ShapeDtypeStruct((1, 512, 1, 256), "bfloat16")
    offset = jax.ShapeDtypeStruct((1,), "int32")
    run = jax.jit(partial(hopper.forward, FlashSpec(scale=1.0), blocks=blocks))
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        run.trace(x, x, x, offset, offset).lower(lowering_platforms=("cuda",))


# Block sizes.


def test_every_head_dim_has_block_sizes():
    assert set(DEFAULTS) == set(HEAD_DIMS)
    assert [supported_head_dim(d) for d in (1, 64, 65, 97, 129, 193, 256)] == [
        64, 64, 96, 128, 192, 256, 256,
    ]  # fmt: skip
    assert blocks_for("unknown", "bfloat16", 64, FULL) == DEFAULTS[64]


def test_mask_classes():
    assert mask_class(FlashSpec(scale=1.0), False) == FULL
    assert mask_class(FlashSpec(scale=1.0, right=0), False) == CAUSAL
    assert mask_class(FlashSpec(scale=1.0, left=5, right=0), False) == WINDOW
    assert mask_class(FlashSpec(scale=1.0, left=5, right=0), True) == SEGMENTS


def test_semantics_are_those_of_mosaic():
    assert set(SEMANTICS) == {"Lane", "Warpgroup"}
    assert compat.lowering_semantics("Lane").name == "Lane"
