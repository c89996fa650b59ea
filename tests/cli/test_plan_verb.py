import json

import pytest

from alpa_lite.passes.pipeline_plan import PipelinePlan, load_plan
from alpa_lite.passes.plan import Plan

MLP = ("plan", "mlp-test", "--cluster", "h100:8", "--batch-size", 64)
OWN = ("plan", "tests.cli.own_steps:linear", "--cluster", "h100:8")


@pytest.fixture(autouse=True)
def in_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.smoke
def test_prints_and_saves_the_plan(invoke, tmp_path):
    file = tmp_path / "plan.json"
    result = invoke(*MLP, "-o", file)
    assert result.exit_code == 0, result.stderr
    plan = Plan.load(file)
    assert plan.name == "mlp-test"
    assert plan.cluster.num_devices == plan.mesh.num_devices == 8
    assert result.stdout == plan.describe() + "\n"
    assert result.stderr == f"saved to {file}\n"


def test_json_is_the_plan_file(invoke, tmp_path):
    file = tmp_path / "plan.json"
    result = invoke(*MLP, "--json", "-o", file)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data == json.loads(file.read_text())
    assert data["predicted"]["step_s"] > 0
    assert {"mesh", "inputs", "decisions", "alternatives", "solve", "cluster"} <= set(data)


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("auto", "AutoParallel()"),
        ("shard", "ShardParallel()"),
        ("data", "DataParallel()"),
        ("zero1", "Zero1Parallel()"),
        ("zero2", "Zero2Parallel()"),
        ("zero3", "Zero3Parallel()"),
    ],
)
def test_method(invoke, method, label):
    result = invoke(*OWN, "--method", method, "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["method"] == label
    assert plan["mesh"][0][1] == 8 or method == "auto"
    assert (plan["inputs"]["w"] != [[], []]) == (method == "zero3") or method in ("auto", "shard")


def test_mesh_microbatches_and_budget(invoke):
    result = invoke(
        *OWN, "--mesh", "dp=2,tp=4", "--num-microbatches", 2, "--memory-budget", "1GiB", "--json"
    )
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["mesh"] == [["dp", 2], ["tp", 4]]
    assert plan["num_microbatches"] == 2
    assert plan["memory_budget_bytes"] == 2**30


def test_settings_of_a_preset(invoke):
    result = invoke(*MLP, "--set", "num_layers=1", "--optimizer", "sgd", "--json")
    assert result.exit_code == 0, result.stderr
    inputs = json.loads(result.stdout)["inputs"]
    assert "state.params.layer_0.w" in inputs
    assert not any("layer_1" in name or ".nu." in name for name in inputs)


def test_factory_may_return_a_setup(invoke):
    result = invoke(
        "plan", "tests.cli.own_steps:setup", "--cluster", "cpu:2", "--batch-size", 8, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["name"] == "tests.cli.own_steps:setup"


def test_cluster_file(invoke, tmp_path):
    from alpa_lite.cost_model import Cluster

    file = tmp_path / "mine.json"
    Cluster.parse("a100-80:2").save(file)
    result = invoke("plan", "tests.cli.own_steps:linear", "--cluster", file)
    assert result.exit_code == 0, result.stderr
    assert "on a100-80:1x2\n" in result.stdout


def test_infeasible_is_2(invoke):
    result = invoke(*MLP, "--memory-budget", "1KiB")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: No choice of strategies fits")
    assert "a larger --memory-budget (memory_budget_bytes)" in result.stderr
    assert result.stdout == ""


def test_infeasible_json(invoke):
    result = invoke(*MLP, "--memory-budget", "1KiB", "--json")
    assert result.exit_code == 2
    data = json.loads(result.stdout)
    assert set(data) == {"error", "message", "need_bytes", "budget_bytes", "row", "breakdown"}
    assert data["error"] == "infeasible"
    assert data["need_bytes"] > data["budget_bytes"] == 1024


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "Missing argument 'TARGET'"),
        (("mlp-test",), "Missing option '--cluster'"),
        ((*MLP[1:], "--fast"), "No such option"),
        (("mlp-tst", *MLP[2:]), "Did you mean 'mlp-test'"),
        ((*MLP[1:], "--set", "hiden_size=8"), "Did you mean 'hidden_size'"),
        ((*MLP[1:], "--set", "hidden_size=-1"), "hidden_size"),
        ((*MLP[1:], "--set", "hidden_size"), "KEY=VALUE"),
        ((*MLP[1:], "--set", "name=x"), "--set cannot change name"),
        ((*MLP[1:], "--optimizer", "adamv"), "Did you mean 'adamw'"),
        ((*MLP[1:], "--method", "zero4"), "zero3"),
        ((*MLP[1:], "--mesh", "2x4"), "--mesh '2x4' is not sizes"),
        ((*MLP[1:], "--mesh", "3,4"), "8"),
        ((*MLP[1:], "--num-microbatches", "few"), "neither a positive number nor auto"),
        ((*MLP[1:], "--num-microbatches", 3), "64 is not divisible by 3"),
        ((*MLP[1:], "--memory-budget", "big"), "not a size"),
        ((*MLP[1:], "-o", "/no/such/folder/plan.json"), "there is no folder /no/such/folder"),
        (("mlp-test", "--cluster", "h100:8"), "--batch-size N"),
        (("mlp-test", "--cluster", "h100:8", "--batch-size", 0), "--batch-size"),
        (("mlp-test", "--cluster", "h900:8", "--batch-size", 8), "unknown kind 'h900'"),
        (("mlp-test", "--cluster", "no/such.json", "--batch-size", 8), "cannot be read"),
        ((*OWN[1:], "--batch-size", 8), "returns batch shapes for 32"),
        ((*OWN[1:], "--set", "num_layers=1"), "built by your code"),
        (("tests.cli.own_steps:decorated", *OWN[2:]), "parallelized already"),
        (("tests.cli.own_steps:number", *OWN[2:]), "returned int"),
        (("tests.cli.own_steps:no_shapes", *OWN[2:]), "state_shapes and batch_shapes"),
        (("tests.cli.own_steps:no_state", *OWN[2:]), "state leaf w"),
        (("tests.cli.own_steps:linaer", *OWN[2:]), "it has crash, decorated, linear"),
        (("tests.cli.missing:linear", *OWN[2:]), "no module 'tests.cli.missing'"),
        (("tests.cli.:linear", *OWN[2:]), "not the form package.module:factory"),
    ],
)  # fmt: skip
def test_bad_input_is_3(invoke, arguments, expected):
    result = invoke("plan", *arguments)
    assert result.exit_code == 3, result.output
    assert expected in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("factory", "error"),
    [("own_steps:crash", ZeroDivisionError), ("broken_import:linear", ModuleNotFoundError)],
)
def test_errors_of_the_user_keep_their_traceback(invoke, factory, error):
    result = invoke("plan", f"tests.cli.{factory}", "--cluster", "h100:8")
    assert isinstance(result.exception, error)


def test_a_grid_with_pipeline_stages(invoke, tmp_path):
    file = tmp_path / "plan.json"
    made = invoke(
        "plan", "mlp-test", "--cluster", "h100:8", "--batch-size", 16, "--method", "3d",
        "--mesh", "dp=4,pp=2", "--remat", "full", "-o", str(file),
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    plan = load_plan(file)
    assert isinstance(plan, PipelinePlan)
    assert len(plan.stages) == 2
    assert {stage.plan.mesh.shape for stage in plan.stages} == {(4,)}
    assert {stage.remat for stage in plan.stages} == {"full"}
    shown = invoke("show", str(file))
    assert shown.exit_code == 0
    assert "2 on 2 submeshes" in shown.stdout


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--method", "3d"], "--method 3d needs --mesh"),
        (["--method", "3d", "--mesh", "2,4"], "--method 3d needs --mesh"),
        (["--method", "auto", "--schedule", "gpipe"], "--schedule is for --method pipeline"),
        (["--method", "3d", "--mesh", "pp=8", "--schedule", "fast"], "there is no schedule 'fast'"),
        (["--method", "3d", "--mesh", "dp=3,pp=2"], "the cluster has 8"),
    ],
)
def test_pipeline_options_that_mean_nothing(invoke, options, wanted):
    made = invoke("plan", "mlp-test", "--cluster", "h100:8", "--batch-size", 16, *options)
    assert made.exit_code == 3
    assert wanted in made.stderr
