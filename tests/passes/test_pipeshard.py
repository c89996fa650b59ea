"""The search over pipelines, and what is planned of what it proposes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError, PlanError, StepError
from alpa_lite.passes import pipeshard
from alpa_lite.passes.pipeline import StepArgs
from alpa_lite.passes.pipeline_methods import PipeshardParallel, ThreeDParallel
from alpa_lite.passes.pipeshard import plan_pipeline
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.grid_search import equal_submesh, grid_candidates
from tests.passes.preset_call import call_of

TABLE = RuleTable()
CLUSTER = Cluster.resolve("h100:2x2")


def plan(call: StepArgs, method: PipeshardParallel | ThreeDParallel, cluster: Cluster = CLUSTER):
    return plan_pipeline(call, method, cluster, table=TABLE)


@pytest.mark.parametrize(
    ("cluster", "stages", "shape"),
    [
        ("h100:2x8", 1, "2x8"),
        ("h100:2x8", 2, "1x8"),
        ("h100:2x8", 4, "1x4"),
        ("h100:2x8", 3, None),
        ("h100:3x8", 3, "1x8"),
        ("h100:3x8", 2, None),  # a host and a half
    ],
)
def test_equal_submeshes(cluster: str, stages: int, shape: str | None) -> None:
    found = equal_submesh(Cluster.resolve(cluster), stages)
    assert (None if found is None else str(found)) == shape


def test_candidates_divide_the_batch_and_the_scan() -> None:
    call = call_of("mlp-test", 12)
    found = list(grid_candidates(call, PipeshardParallel(), CLUSTER, 6))
    assert {c.num_stages for c in found} == {1, 2}  # four stages cannot share six layers
    assert all(12 % c.num_microbatches == 0 for c in found)
    fixed = PipeshardParallel(num_stages=2, num_microbatches=4, remat="full")
    (only,) = grid_candidates(call, fixed, CLUSTER, 4)
    assert (only.num_stages, only.num_microbatches, only.remat) == (2, 4, "full")


def test_the_best_of_all_candidates_is_chosen() -> None:
    found = plan(call_of("mlp-test", 8), PipeshardParallel())
    times = [a.step_s for a in found.plan.alternatives if a.step_s is not None]
    assert found.plan.predicted.step_s == min(times)
    assert len(times) >= 2
    fixed = plan(call_of("mlp-test", 8), ThreeDParallel(dp=2, tp=1, pp=2, num_microbatches=2))
    assert found.plan.predicted.step_s <= fixed.plan.predicted.step_s


def test_other_schedules_are_tried_for_the_best() -> None:
    found = plan(call_of("mlp-test", 8), PipeshardParallel(num_stages=2, num_microbatches=4))
    tried = {a.description.split(", ")[2] for a in found.plan.alternatives}
    assert tried == {"1f1b", "eager_1f1b", "zb-h1", "gpipe"}
    assert all(a.step_s is not None or "even if" in a.reason for a in found.plan.alternatives)
    chosen = min(found.plan.alternatives, key=lambda a: a.step_s or float("inf"))
    assert f", {found.plan.schedule}," in chosen.description


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv", "chimera", "dualpipe", "gpipe"])
def test_any_schedule_can_be_asked_for(schedule: str) -> None:
    call = call_of("mlp-test", 8, num_layers=5)
    found = plan(call, PipeshardParallel(schedule=schedule, num_microbatches=4))
    assert found.plan.schedule == schedule
    layers = [i for s in found.plan.stages if s.pipeline == 0 for i in s.layers]
    assert layers == list(range(found.plan.num_layers))


def test_more_freedom_is_never_worse() -> None:
    call = call_of("mlp-test", 8)
    free = plan(call, PipeshardParallel())
    for stages in (1, 2):
        bound = plan(call, PipeshardParallel(num_stages=stages))
        assert free.plan.predicted.step_s <= bound.plan.predicted.step_s * (1 + 1e-9)


@pytest.mark.slow
def test_a_scan_is_cut_into_equal_stages() -> None:
    call = call_of("llama-scan-test", 8, num_layers=4)
    found = plan(call, PipeshardParallel(num_stages=2, num_microbatches=4))
    assert found.plan.num_pieces == 2
    assert [s.layers for s in found.plan.stages] == [(0,), (1,)]


def test_memory_decides_on_rematerialisation() -> None:
    call = call_of("gpt-test", 8, num_layers=2)
    method = PipeshardParallel(num_stages=2, num_microbatches=2, schedule="1f1b", layer_num=2)
    roomy = plan(call, method)
    assert {s.remat for s in roomy.plan.stages} == {"none"}
    tight = replace(method, memory_budget_bytes=0.9 * roomy.plan.predicted.peak_bytes)
    found = plan(call, tight)
    assert found.plan.predicted.peak_bytes <= tight.memory_budget_bytes
    assert {s.remat for s in found.plan.stages} != {"none"}


def test_nothing_fits() -> None:
    with pytest.raises(
        InfeasibleError, match=r"sums of gradients take .* Use more devices"
    ) as found:
        plan(call_of("mlp-test", 8), PipeshardParallel(memory_budget_bytes=1000))
    assert found.value.need_bytes > found.value.budget_bytes == 1000


def test_the_state_fits_but_not_the_activations() -> None:
    call = call_of("gpt-test", 8, num_layers=2)
    with pytest.raises(InfeasibleError, match=r"stage \d of \d .* More stages"):
        plan(call, PipeshardParallel(memory_budget_bytes=400_000, num_microbatches=1))


def test_more_stages_than_layers_or_devices() -> None:
    with pytest.raises(StepError, match="50 stages need at least as many layers; the model has"):
        plan(call_of("mlp-test", 8), PipeshardParallel(num_stages=50))
    with pytest.raises(PlanError, match="5 stages need at least as many devices; the cluster has"):
        plan(call_of("mlp-test", 8, num_layers=6), PipeshardParallel(num_stages=5))


def test_a_logical_mesh_for_all_stages() -> None:
    found = plan(call_of("mlp-test", 8), PipeshardParallel(mesh_shape=(2, 1), num_microbatches=4))
    assert {m.submesh.num_devices for m in found.plan.meshes} == {2}
    with pytest.raises(PlanError, match=r"no submesh .* has the devices of mesh_shape \(3,\)"):
        plan(call_of("mlp-test", 8), PipeshardParallel(mesh_shape=(3,), num_microbatches=4))


def test_a_number_of_stages_that_does_not_divide_the_devices() -> None:
    found = plan(call_of("mlp-test", 8), PipeshardParallel(num_stages=3, num_microbatches=4))
    assert len(found.plan.stages) == 3
    assert sorted(m.submesh.num_devices for m in found.plan.meshes) in ([1, 1, 1], [1, 1, 2])


def test_interrupt_returns_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    realise = pipeshard.realise

    def interrupted(*args, **kwargs):
        if len(planned) == 1:
            raise KeyboardInterrupt
        planned.append(realise(*args, **kwargs))
        return planned[-1]

    monkeypatch.setattr(pipeshard, "realise", interrupted)
    monkeypatch.setattr(pipeshard, "_WORTH", 100.0)  # other schedules are worth planning
    found = plan(call_of("mlp-test", 8), PipeshardParallel(num_stages=2))
    assert found.plan.predicted.step_s == planned[0].plan.predicted.step_s
    assert len(found.plan.alternatives) == 1


def test_interrupt_before_anything_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeshard, "realise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan(call_of("mlp-test", 8), PipeshardParallel())
