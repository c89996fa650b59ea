"""Random steps cut at random, run as pipelines under random schedules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alpa_lite
from tests.passes.stages.random_steps import (
    RandomStep,
    loss_of,
    make_batch,
    make_state,
    make_update,
    random_steps,
)
from tests.runtime.pipeline_cases import Case, run_steps

# Sums in another order; float16 products round the other way where one falls on a boundary.
RTOL = 5e-3


@st.composite
def pipelines(draw: Any) -> tuple[RandomStep, alpa_lite.ManualPipeline]:
    """A step of two to four stages, and how it is run."""
    step = draw(random_steps(max_layers=4).filter(lambda s: 2 <= len(s.stages) <= 4))
    num = len(step.stages)
    options: dict[str, Any] = {"num_microbatches": draw(st.sampled_from([1, 2, 4]))}
    sizes = [draw(st.sampled_from([1, 2])) for _ in range(num)]
    schedules = ["1f1b", "gpipe", "zb-h1"]
    if num % 2 == 0:
        schedules += ["chimera", "interleaved_1f1b"]
    options["schedule"] = draw(st.sampled_from(schedules))
    if options["schedule"] == "chimera":
        options["num_microbatches"] = draw(st.sampled_from([2, 4]))
        sizes = sizes[:1] * num
    if options["schedule"] == "interleaved_1f1b":
        options |= {"num_virtual": 2, "num_microbatches": draw(st.sampled_from([2, 4]))}
        sizes = sizes[: num // 2]
    options["remat"] = draw(st.sampled_from(["none", "dots", "full"]))
    submeshes = [(1, size) for size in sizes]
    return step, alpa_lite.ManualPipeline(step.stages, submeshes, **options)


@pytest.mark.slow
@settings(max_examples=10)
@given(pipelines())
def test_random_pipelines(drawn: tuple[RandomStep, alpa_lite.ManualPipeline]) -> None:
    step, method = drawn
    case = Case(loss_of(step), make_update(step), lambda: make_state(step), make_batch)
    run_steps(case, method, rtol=RTOL)
