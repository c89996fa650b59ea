import json

import pytest

from alpa_lite.cli.find import find_inputs, find_stage, find_subjects
from alpa_lite.passes.pipeline_plan import load_plan, plan_from_json

OUTCOME = {"step_s", "peak_bytes", "reason"}


def explained(invoke, *arguments):
    result = invoke("explain", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def replanned(invoke, file, *sets):
    arguments = [text for each in sets for text in ("--set", each)]
    result = invoke("whatif", file, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return plan_from_json(json.loads(result.stdout)["plan"]).predicted


def test_whole_plan(invoke, plan_files):
    data = explained(invoke, plan_files["one"])
    plan = load_plan(plan_files["one"])
    assert set(data) == {"step_s", "sensitivity", "baselines"}
    assert data["step_s"] == plan.predicted.step_s
    sensitivity = data["sensitivity"]
    assert set(sensitivity) == {"binding", "unlimited_memory", "more_memory", "more_bandwidth"}
    assert all(set(v) == OUTCOME for k, v in sensitivity.items() if k != "binding")
    assert sensitivity["binding"] == "nothing"
    by_name = {each["name"]: each["outcome"] for each in data["baselines"]}
    for name, method in (("data parallel", "data"), ("FSDP (ZeRO-3)", "zero3")):
        again = replanned(invoke, plan_files["one"], f"method={method}")
        assert by_name[name] == {
            "step_s": again.step_s, "peak_bytes": again.peak_bytes, "reason": "",
        }  # fmt: skip
    assert by_name["searched, one mesh"]["step_s"] == plan.predicted.step_s


def test_parameter(invoke, plan_files):
    (found,) = explained(invoke, plan_files["one"], "layer_1.w")["decisions"]
    assert found["inputs"] == ["state.params.layer_1.w"] and found["stage"] is None
    assert found["decision"]["name"] == "state.params.layer_1.w"
    assert found["layout"] == str(load_plan(plan_files["one"]).inputs["state.params.layer_1.w"])
    assert found["runner_up"]["outcome"]["step_s"] > 0
    text = invoke("explain", plan_files["one"], "layer_1.w").stdout
    assert text.startswith("state.params.layer_1.w\n  chosen ")
    assert all(f"\n  {name} " in text for name in ("costs", "binds", "runner-up"))


def test_operation_and_what_has_no_choice(invoke, plan_files):
    decisions = load_plan(plan_files["one"]).decisions
    name = next(d.name for d in decisions if "jvp(layer_1):dot_general" in d.name)
    found = explained(invoke, plan_files["one"], name)
    assert [d["decision"]["name"] for d in found["decisions"]] == [name]
    fixed = explained(invoke, plan_files["one"], "state.step")
    assert fixed == {"decisions": [], "without_choice": ["state.step"]}
    text = invoke("explain", plan_files["one"], "state.step").stdout
    assert text == "state.step: replicated, as nothing there can be split.\n"


def test_stage_and_parameter_of_a_stage(invoke, plan_files):
    plan = load_plan(plan_files["staged"])
    data = explained(invoke, plan_files["staged"], "stage 1")
    assert data["index"] == 1 and data["step_s"] == plan.predicted.step_s
    assert data["stage"]["layers"] == list(plan.stages[1].layers)
    assert data["stage"]["logical_mesh"] == dict(plan.stages[1].plan.mesh.axes)
    assert {c["change"] for c in data["changes"]} >= {"remat dots", "remat full"}
    remat = next(c for c in data["changes"] if c["change"] == "remat full")
    assert remat["outcome"]["step_s"] >= plan.predicted.step_s * 0.99
    (found,) = explained(invoke, plan_files["staged"], "layer_1.w")["decisions"]
    assert found["stage"] == 1
    assert found["step_s"] == plan.stages[1].plan.predicted.step_s


def test_whole_pipeline(invoke, plan_files):
    result = invoke("explain", plan_files["staged"])
    assert result.exit_code == 0, result.stderr
    plan = load_plan(plan_files["staged"])
    assert f"{plan.name} on {plan.cluster.name}: " in result.stdout
    assert all(text in result.stdout for text in ("mesh 1 waits", "FSDP (ZeRO-3)", "Megatron"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("ONE", "layer_9.w"), "no input of the plan and no operation"),
        (("ONE", "layer_1.ww"), "close are state.params.layer_1.w"),
        (("ONE", "*"), "name fewer"),
        (("ONE", "stage 0"), "the plan has no stages"),
        (("STAGED", "stage 2"), "stages 0 to 1"),
        (("STAGED", "layer_9.w"), "no input of the plan and no operation"),
        (("ONE", "--target", "gpt-test"), "was made from mlp-test"),
        (("no.json",), "no plan file at"),
    ],
)
def test_bad_input_is_3(invoke, plan_files, arguments, expected):
    named = {"ONE": plan_files["one"], "STAGED": plan_files["staged"]}
    result = invoke("explain", *(named.get(each, each) for each in arguments))
    assert result.exit_code == 3, result.output
    assert expected in result.stderr and result.stdout == ""


def test_names(plan_files):
    one, staged = load_plan(plan_files["one"]), load_plan(plan_files["staged"])
    assert find_inputs("state.step", one) == ["state.step"]
    assert find_inputs("*.mu.layer_0.*", one) == [
        "state.opt_state.0.mu.layer_0.b", "state.opt_state.0.mu.layer_0.w",
    ]  # fmt: skip
    assert find_inputs("layer_0", one) == ["state.params.layer_0.b", "state.params.layer_0.w"]
    assert find_inputs("mu.layer_0.w", one) == ["state.opt_state.0.mu.layer_0.w"]
    paths, names = find_subjects("dot_general", one)
    assert paths == [] and len(names) > 3 and all("dot_general" in name for name in names)
    assert [find_stage(text, staged) for text in ("stage 1", "stage0", "Stage-1", "x", "1")] == [
        1, 0, 1, None, None,
    ]  # fmt: skip
