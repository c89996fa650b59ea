"""Random steps, cut at random: the stages together are the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.stages.random_steps import (
    RandomStep,
    as_function,
    make_batch,
    make_state,
    random_steps,
)
from tests.passes.stages.stage_flow import check, staged

remats = st.sampled_from(["none", "dots", "full"])
shares = st.sampled_from([(1.0,), (1.0,), (0.5, 0.5), (0.25, 0.75)])


def check_random(step: RandomStep, remat: str, share: tuple[float, ...]) -> None:
    """Every output of all stages against the step.

    Results per example and counts belong to one pipeline's microbatches; two pipelines that see the
    same rows, as here, would count them twice.
    """
    if any(layer.aux in ("rows", "count") for layer in step.layers):
        share = (1.0,)
    fun = as_function(step)
    found = staged(
        fun, make_state(step), make_batch(), stages=step.stages, remat=remat, shares=share
    )
    check(found, rtol=1e-4)
    names = {name for i in range(len(found.steps)) for name in found.state_of(i)}
    total = sum(len(found.state_of(i)) for i in range(len(found.steps)))
    assert len(names) == total == len(found.source.names.aliases), "every leaf lives on one stage"


def case(examples: int) -> Callable[..., Any]:
    """Decorate a test that takes a random step, how it is differentiated, and its pipelines."""

    def wrap(test: Callable[..., Any]) -> Any:
        return settings(max_examples=examples)(given(random_steps(), remats, shares)(test))

    return wrap


@case(6)
def test_some_random_steps(step: RandomStep, remat: str, share: tuple[float, ...]) -> None:
    check_random(step, remat, share)


@pytest.mark.slow
@case(80)
def test_random_steps(step: RandomStep, remat: str, share: tuple[float, ...]) -> None:
    check_random(step, remat, share)
