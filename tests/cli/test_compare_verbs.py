import json

import pytest

from alpa_lite.passes.pipeline_plan import load_plan, plan_from_json
from alpa_lite.passes.plan_diff import describe_diff, diff_plans

MLP = ("plan", "mlp-test", "--batch-size", 64)
KEYS = {"section", "name", "before", "after", "unit", "ratio"}


def by_name(changes, section):
    return {c["name"]: (c["before"], c["after"]) for c in changes if c["section"] == section}


def test_diff(invoke, plan_files):
    before, after = (load_plan(plan_files[name]) for name in ("one", "staged"))
    text = invoke("diff", plan_files["one"], plan_files["staged"])
    assert text.exit_code == 0, text.stderr
    assert text.stdout == describe_diff(diff_plans(before, after)) + "\n"
    changes = json.loads(invoke("diff", plan_files["one"], plan_files["staged"], "--json").stdout)
    assert all(set(change) == KEYS for change in changes)
    step = (before.predicted.step_s, after.predicted.step_s)
    assert by_name(changes, "seconds")["step"] == step
    assert by_name(changes, "plan")["stages"] == (None, 2)
    assert by_name(changes, "asked for")["batch_size"] == (64, 16)
    same = invoke("diff", plan_files["one"], plan_files["one"], "--json")
    assert json.loads(same.stdout) == []


def test_whatif_is_the_plan_of_the_changed_options(invoke, plan_files, tmp_path):
    file = tmp_path / "new.json"
    result = invoke(
        "whatif", plan_files["one"], "--set", "cluster.hosts=2", "--set", "model.num_layers=2",
        "--budget", "1GiB", "-o", file, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    made = plan_from_json(data["plan"])
    assert made == load_plan(file)
    asked = invoke(
        *MLP, "--cluster", "h100:2x8", "--set", "num_layers=2", "--memory-budget", "1GiB", "--json"
    )
    direct = plan_from_json(json.loads(asked.stdout))
    assert diff_plans(made, direct) == ()
    assert by_name(data["changes"], "asked for") == {
        "memory_budget": (None, "1GiB"), "model.num_layers": (3, 2),
    }  # fmt: skip
    assert by_name(data["changes"], "cluster")["num_hosts"] == (1, 2)
    assert by_name(data["changes"], "bytes")["budget per device"][1] == 2**30


def test_whatif_with_pins(invoke, plan_files):
    arguments = ("--set", "mesh=dp=2,tp=4", "--pin", 'layer_1.w=P(None,"tp")', "--json")
    result = invoke("whatif", plan_files["one"], *arguments)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["plan"]["inputs"]["state.params.layer_1.w"] == [[], ["tp"]]
    assert data["plan"]["configuration"]["pin.state.params.layer_1.w"] == 'P(None,"tp")'
    changed = by_name(data["changes"], "layouts")
    assert changed["state.params.layer_1.w"] == ("[-, -]", "[-, tp]")


def test_whatif_text(invoke, plan_files):
    result = invoke("whatif", plan_files["one"], "--set", "method=zero3")
    assert result.exit_code == 0, result.stderr
    assert "  method  auto  -> zero3\n" in result.stdout
    assert "Seconds\n" in result.stdout and "Layouts\n" in result.stdout


def test_whatif_that_does_not_fit_is_2(invoke, plan_files):
    result = invoke("whatif", plan_files["one"], "--budget", "1KiB", "--json")
    assert result.exit_code == 2
    data = json.loads(result.stdout)
    assert data["error"] == "infeasible" and data["budget_bytes"] == 1024


def test_own_code_has_to_be_named(invoke, tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    file = tmp_path / "plan.json"
    made = invoke("plan", "tests.cli.own_steps:linear", "--cluster", "h100:8", "-o", file)
    assert made.exit_code == 0, made.stderr
    change = ("whatif", file, "--set", "cluster.hosts=2", "--json")
    refused = invoke(*change)
    assert refused.exit_code == 3
    assert "add --target tests.cli.own_steps:linear" in refused.stderr
    result = invoke(*change, "--target", "tests.cli.own_steps:linear")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["plan"]["cluster"]["num_hosts"] == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("diff", "ONE", "no.json"), "no plan file at no.json"),
        (("whatif", "ONE"), "nothing is changed"),
        (("whatif", "ONE", "--set", "method=auto"), "nothing is changed"),
        (("whatif", "ONE", "--set", "cluster.speed=2"), "knows no 'cluster.speed'"),
        (("whatif", "ONE", "--set", "num_leyers=2"), "Did you mean 'num_layers'"),
        (("whatif", "ONE", "--pin", 'layer_9.w=P("x")'), "is no input of the plan"),
        (("whatif", "ONE", "--pin", 'layer_1.w=P("qq")'), "names axis 'qq'"),
        (("whatif", "ONE", "--pin", "layer_1.w=tp"), "no layout"),
        (("whatif", "ONE", "--target", "gpt-test"), "was made from mlp-test"),
        (("whatif", "STAGED", "--pin", 'layer_1.w=P("dp")'), "plans on one mesh"),
        (("whatif", "ONE", "--budget", "1GiB", "-o", "/no/such/x"), "there is no folder"),
    ],
)
def test_bad_input_is_3(invoke, plan_files, arguments, expected):
    named = {"ONE": plan_files["one"], "STAGED": plan_files["staged"]}
    result = invoke(*(named.get(each, each) for each in arguments))
    assert result.exit_code == 3, result.output
    assert expected in result.stderr and result.stdout == ""
