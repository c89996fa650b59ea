"""Submeshes are priced around the best; stages that do not fit recompute more."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError
from alpa_lite.passes.inter_op import Submesh, submesh_shapes
from alpa_lite.passes.pipeline_methods import REMAT_POLICIES, PipeshardParallel
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages import stage_planner
from alpa_lite.passes.stages.priced_counts import PricedCounts
from alpa_lite.passes.stages.propose import StageSearch
from alpa_lite.passes.stages.realise import PlannedPipeline, realise
from alpa_lite.passes.stages.search_space import first_submeshes
from alpa_lite.passes.stages.source import LayeredStep, layer_step, trace_step
from alpa_lite.passes.stages.spec import PipelineSpec, StageSpec
from tests.passes.preset_call import call_of

TABLE = RuleTable()
CLUSTER = Cluster.resolve("h100:4x4")
METHOD = PipeshardParallel(num_microbatches=4)
CALL = call_of("mlp-test", 8, num_layers=4)


def silent(what: str, done: float) -> None:
    pass


def texts(submeshes: list[Submesh]) -> list[str]:
    return [str(s) for s in submeshes]


@pytest.mark.parametrize(
    ("cluster", "num_stages", "expected"),
    [
        ("h100:2x4", 8, "1x1 1x2 1x4 2x4"),  # few: all
        ("h100:8x8", 48, "1x4 1x8 2x8"),  # around a host
        ("h100:8x8", 1, "4x8 8x8"),  # one stage has all devices
        ("h100:2048x8", 126, "8x8 16x8 32x8"),  # 126 stages of 16x8 leave 2 % idle
    ],
)
def test_the_first_submeshes(cluster: str, num_stages: int, expected: str) -> None:
    resolved = Cluster.resolve(cluster)
    offered = submesh_shapes(resolved.num_hosts, resolved.devices_per_host)
    assert " ".join(texts(first_submeshes(offered, resolved, num_stages))) == expected


def test_more_submeshes_are_priced_when_the_best_stages_are_at_the_edge() -> None:
    layers = PricedCounts(
        CALL, trace_step(CALL, 1), METHOD, CLUSTER, TABLE, silent, ("none",), several=False
    )
    layers.price(4)
    pricer = layers.priced[4].pricer
    assert texts(pricer.submeshes) == ["1x2", "1x4", "2x4"]
    assert not layers.widen(4, [Submesh(1, 4)])
    (note,) = layers.not_priced()
    assert "stages on 1x1, 4x4 devices were not considered" in note
    assert layers.widen(4, [Submesh(1, 4), Submesh(2, 4)])
    assert texts(pricer.submeshes) == ["1x2", "1x4", "2x4", "4x4"]
    assert layers.widen(4, [Submesh(1, 2)])
    assert texts(pricer.submeshes)[-1] == "1x1"
    assert not layers.widen(4, [Submesh(1, 1), Submesh(4, 4)])
    assert layers.not_priced() == ()


def test_nothing_better_is_on_the_submeshes_that_were_left_out() -> None:
    search = StageSearch(CALL, trace_step(CALL, 1), METHOD, CLUSTER, TABLE, silent)
    search.run()
    found = search.proposals(1.0)[0].estimate_s
    pricer = search.priced[4].pricer
    for submesh in search.layers.offered:
        if submesh not in pricer.submeshes:
            assert pricer.price(submesh, math.inf)
    assert search.proposals(1.0)[0].estimate_s == pytest.approx(found, rel=0.005)  # the gap


@functools.cache
def blocks() -> LayeredStep:
    """Four layers with large activations."""
    return layer_step(call_of("gpt-test", 64, num_layers=4), 4, 4, table=TABLE)


def pipeline(budget_bytes: float | None, remats: tuple[str, ...] = ()) -> PlannedPipeline:
    """Four stages of a layer and a device each, nothing computed again if that fits."""
    method = replace(METHOD, memory_budget_bytes=budget_bytes, layer_num=4)
    stages = tuple(StageSpec((i,), Submesh(1, 1), None, "none") for i in range(4))
    spec = PipelineSpec(stages, 4, "1f1b")
    return realise("step", blocks(), spec, method, CLUSTER, TABLE, silent, remats=remats)


def test_stages_that_do_not_fit_compute_more_again() -> None:
    needs = [s.peak_bytes for s in pipeline(None).plan.stages]
    budget = 0.97 * max(needs)
    with pytest.raises(InfeasibleError, match=r"stage \d of 4 .* in flight"):
        pipeline(budget)
    found = pipeline(budget, REMAT_POLICIES)
    assert all(s.peak_bytes <= budget for s in found.plan.stages)
    for stage, need in zip(found.plan.stages, needs, strict=True):
        assert (stage.remat != "none") == (need > budget)
    with pytest.raises(InfeasibleError):
        pipeline(0.1 * max(needs), REMAT_POLICIES)


def test_alike_stages_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    plan_stage = stage_planner.plan_stage

    def counting(*args, **kwargs):
        planned.append(args[2])
        return plan_stage(*args, **kwargs)

    monkeypatch.setattr(stage_planner, "plan_stage", counting)
    stages = pipeline(None).plan.stages
    assert len(planned) == 3  # first, middle, last
    assert [s.in_flight for s in stages] == [4, 3, 2, 1]
    assert stages[1].forward_s == stages[2].forward_s
    assert stages[1].peak_bytes - stages[2].peak_bytes == pytest.approx(stages[1].stash_bytes)
