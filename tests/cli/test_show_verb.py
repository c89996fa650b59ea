import json

import pytest

from alpa_lite.passes.plan import Plan


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    import alpa_lite
    from tests.cli import own_steps

    step, *shapes = own_steps.linear()
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    alpa_lite.parallelize(step, cluster="cpu:4").plan(*shapes).save(file)
    return file


def test_prints_the_plan(invoke, plan_file):
    result = invoke("show", plan_file)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == Plan.load(plan_file).describe() + "\n"


def test_json(invoke, plan_file):
    result = invoke("show", plan_file, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(plan_file.read_text())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no plan file at"),
        ("{", "is not JSON"),
        ("{}", "is missing"),
        ("[]", "expected an object"),
    ],
)
def test_bad_file_is_3(invoke, tmp_path, content, expected):
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    result = invoke("show", file)
    assert result.exit_code == 3
    assert result.stderr.startswith("error: ") and expected in result.stderr


def test_edited_field_is_named(invoke, plan_file, tmp_path):
    data = json.loads(plan_file.read_text())
    data["predicted"]["step_s"] = "fast"
    file = tmp_path / "edited.json"
    file.write_text(json.dumps(data))
    result = invoke("show", file)
    assert result.exit_code == 3
    assert "predicted: step_s: expected a finite number" in result.stderr


def test_folder_is_3(invoke, tmp_path):
    result = invoke("show", tmp_path)
    assert result.exit_code == 3
    assert "cannot be read" in result.stderr


def test_terminal_escapes_in_a_file_are_shown_not_sent(invoke, plan_file, tmp_path):
    data = json.loads(plan_file.read_text())
    data["name"] = "evil\x1b[2J"
    data["notes"] = ["two\nlines"]
    file = tmp_path / "evil.json"
    file.write_text(json.dumps(data))
    result = invoke("show", file)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "evil\\x1b[2J" in result.stdout and "two\\nlines" in result.stdout


@pytest.mark.parametrize("program", ["megatron", "maxtext"])
def test_as_another_program(invoke, plan_files, program):
    from alpa_lite.passes.flag_names import FLAGS
    from alpa_lite.passes.pipeline_plan import load_plan

    found = FLAGS[program](load_plan(plan_files["staged"]))
    data = json.loads(invoke("show", plan_files["staged"], "--as", program, "--json").stdout)
    assert data == {"flags": [list(f) for f in found.flags], "remarks": list(found.remarks)}
    text = invoke("show", plan_files["staged"], "--as", program)
    assert text.exit_code == 0
    assert len(text.stdout.splitlines()) == len(found.flags)
    first = {
        "megatron": "--tensor-model-parallel-size 1", "maxtext": "ici_pipeline_parallelism=2",
    }[program]  # fmt: skip
    assert first in text.stdout
    assert text.stderr.startswith("note: layouts are chosen per parameter")


def test_as_an_unknown_program_is_3(invoke, plan_files):
    result = invoke("show", plan_files["one"], "--as", "deepspeed")
    assert result.exit_code == 3 and "megatron" in result.stderr
