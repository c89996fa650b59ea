import gzip
import json

import pytest

from alpa_lite.passes.pipeline_plan import load_plan
from alpa_lite.passes.pipeline_timeline import plan_timeline


@pytest.mark.parametrize("name", ["one", "staged"])
def test_every_mesh_adds_up_to_the_predicted_step(invoke, plan_files, name, tmp_path):
    trace = tmp_path / "step.json.gz"
    result = invoke("simulate", plan_files[name], "--trace", trace, "--json")
    assert result.exit_code == 0, result.stderr
    assert str(trace) in result.stderr
    data, plan = json.loads(result.stdout), load_plan(plan_files[name])
    assert set(data) == {"step_s", "meshes", "links", "trace"}
    assert data["step_s"] == plan.predicted.step_s and data["trace"] == str(trace)
    for mesh in data["meshes"]:
        spent = sum(value for key, value in mesh.items() if key.endswith("_s"))
        assert spent == pytest.approx(plan.predicted.step_s, rel=1e-12)
    slices = [
        each
        for each in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        if each["ph"] == "X"
    ]
    tracks = {each["tid"] for each in slices}
    assert len(tracks) == len(data["meshes"]) + len(data["links"])


def test_seconds_are_those_of_the_plan(invoke, plan_files):
    one = json.loads(invoke("simulate", plan_files["one"], "--json").stdout)
    predicted = load_plan(plan_files["one"]).predicted
    (mesh,) = one["meshes"]
    assert mesh["compute_s"] == predicted.compute_s
    assert mesh["communication_s"] == pytest.approx(predicted.communication_s, rel=1e-9)
    assert mesh["bubble_s"] == pytest.approx(0.0, abs=1e-12) and one["links"] == []
    assert mesh["peak_bytes"] == round(predicted.peak_bytes)

    staged = json.loads(invoke("simulate", plan_files["staged"], "--json").stdout)
    plan = load_plan(plan_files["staged"])
    timeline = plan_timeline(plan)
    for mesh, stage in zip(staged["meshes"], plan.stages, strict=True):
        assert mesh["compute_s"] == pytest.approx(timeline.busy_s[mesh["mesh"]], rel=1e-9)
        assert mesh["update_s"] == pytest.approx(stage.per_step_s, rel=1e-9)
    forward, back = staged["links"]
    assert (forward["source"], forward["target"]) == (0, 1)
    assert forward["transfers"] == back["transfers"] == plan.num_microbatches
    assert forward["seconds"] == pytest.approx(plan.num_microbatches * plan.stages[0].send_s)


def test_text(invoke, plan_files):
    result = invoke("simulate", plan_files["staged"])
    assert result.exit_code == 0, result.stderr
    assert "One step of mlp-test: " in result.stdout
    assert "Between meshes" in result.stdout and "bubble" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("no.json",), "no plan file at"),
        (("PLAN", "--trace", "/no/such/folder/x.json"), "there is no folder /no/such/folder"),
        (("PLAN", "--trace", "FOLDER"), "cannot be written"),
    ],
)
def test_bad_input_is_3(invoke, plan_files, arguments, expected, tmp_path):
    named = {"PLAN": plan_files["one"], "FOLDER": tmp_path}
    arguments = [named.get(each, each) for each in arguments]
    result = invoke("simulate", *arguments)
    assert result.exit_code == 3, result.output
    assert expected in result.stderr and result.stdout == ""
