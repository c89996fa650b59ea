import json

import pytest

from alpa_lite.cli.budget_plan import _grids
from alpa_lite.cli.budget_shape import nearest_sizes, parameters_of
from alpa_lite.cost_model import Cluster
from alpa_lite.cost_model.llm.scaling import SCALING_LAWS, compute_optimum
from alpa_lite.models import build
from alpa_lite.passes.pipeline_methods import ThreeDParallel


def test_flops_give_model_and_tokens(invoke):
    result = invoke("budget", "--flops", "1e24", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    best = compute_optimum(1e24, SCALING_LAWS["hoffmann"])
    assert found["optimum"]["parameters"] == best.parameters
    model = found["model"]
    assert 6 * model["parameters"] * model["tokens"] == pytest.approx(1e24)
    assert model["steps"] * model["batch_size"] * 4096 >= model["tokens"]
    assert "plan" not in found


def test_devices_and_days_are_operations(invoke):
    """512 devices x 30 days x 40 % of 989 TFLOP/s."""
    result = invoke(
        "budget", "--gpus", 512, "--days", 30, "--cluster", "h100:64x8", "--plan-seconds", 0,
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["flops"] == pytest.approx(512 * 30 * 86400 * 0.4 * 989e12)


@pytest.mark.parametrize("parameters", [0.4e9, 1.3e9, 8e9, 33e9, 70e9, 405e9, 2e12])
def test_nearest_model_is_near_and_looks_like_llama(parameters):
    sizes = nearest_sizes(parameters)
    assert parameters_of(sizes) == pytest.approx(parameters, rel=0.15)
    assert 80 <= sizes["hidden_size"] / sizes["num_layers"] <= 160
    assert build("llama3-8b", scan_layers=True, **sizes).num_parameters == parameters_of(sizes)


def test_grids_fill_the_cluster():
    grids = list(_grids(64, 1024, Cluster.parse("h100:16x8")))
    assert grids[0] == ThreeDParallel(dp=16, tp=8, pp=1, num_microbatches=32)
    for grid in grids:
        assert grid.dp * grid.tp * grid.pp == 128
        assert 1024 % (grid.dp * grid.num_microbatches) == 0
        assert grid.pp == 1 or grid.num_microbatches >= 4 * grid.pp


@pytest.mark.slow
def test_plan_days_and_cost(invoke):
    """A step takes as long as planned, so days are steps x seconds, and each hour costs 2 x 8."""
    result = invoke(
        "budget", "--flops", "1e19", "--cluster", "h100:8", "--price", 2, "--seq", 512,
        "--batch-size", 64, "--plan-seconds", 1, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    plan = found["plan"]
    assert plan["dp"] * plan["tp"] * plan["pp"] == plan["num_devices"] == 8
    assert plan["days"] == pytest.approx(found["model"]["steps"] * plan["step_s"] / 86400)
    assert plan["cost"] == pytest.approx(plan["days"] * 24 * 8 * 2)
    assert 0 < plan["mfu"] < 1
    assert plan["peak_bytes"] <= Cluster.parse("h100:8").usable_hbm_bytes


@pytest.mark.slow
def test_no_plan_fits(invoke):
    result = invoke("budget", "--flops", "1e24", "--cluster", "v100:8", "--plan-seconds", 1)
    assert result.exit_code == 2
    assert "GiB" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --flops 1e24, or --gpus"),
        (("--flops", "1e24", "--days", 3), "not both"),
        (("--flops", 5), "not between"),
        (("--gpus", 8, "--days", 3), "give --flops 1e24"),
        (("--gpus", 8, "--days", 3, "--cluster", "h100:16"), "at most 8 devices"),
        (("--gpus", 16, "--days", 3, "--cluster", "h100:8"), "devices differ"),
        (("--gpus", 8, "--days", 0, "--cluster", "h100:8"), "--days 0 is not"),
        (("--flops", "1e24", "--mfu", 2), "--mfu 2 is not a share"),
        (("--flops", "1e24", "--law", "x"), "none of hoffmann, besiroglu"),
        (("--flops", "1e24", "--price", 2), "--price needs --cluster"),
        (("--flops", "1e16"), "give a larger or smaller budget"),
    ],
)
def test_bad_input(invoke, arguments, message):
    result = invoke("budget", *arguments)
    assert result.exit_code == 3
    assert message in result.stderr
