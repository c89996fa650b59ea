"""Calls of the presets' train steps, for planning."""

from __future__ import annotations

import jax

from alpa_lite.models import build
from alpa_lite.passes.pipeline import StepArgs


def call_of(preset: str, batch_size: int = 16, **overrides: int) -> StepArgs:
    """The step of a preset, its state as shapes."""
    setup = build(preset, **overrides)
    state = jax.eval_shape(setup.init, jax.random.key(0))
    return StepArgs(
        fun=setup.step, args=(state, setup.make_batch(0, batch_size)), arg_names=("state", "batch"),
        batch_argnums=(1,), donate_argnums=(0,), name=preset,
    )  # fmt: skip
