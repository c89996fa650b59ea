import json

import pytest

from alpa_lite.passes.html import report_page
from alpa_lite.passes.pipeline_plan import load_plan
from alpa_lite.passes.units import format_seconds
from tests.passes.test_html import Outline


@pytest.mark.parametrize("name", ["one", "staged"])
def test_report_of_a_plan_file(invoke, plan_files, name, tmp_path):
    file = tmp_path / "report.html"
    result = invoke("report", plan_files[name], "-o", file, "--json")
    assert result.exit_code == 0, result.stderr
    assert file.read_text() == report_page(load_plan(plan_files[name]))
    assert json.loads(result.stdout) == {"output": str(file), "num_bytes": file.stat().st_size}
    assert "alpa-lite report --explain" in file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "staged"])
def test_explained(invoke, plan_files, name, tmp_path):
    file = tmp_path / "report.html"
    result = invoke("report", plan_files[name], "-o", file, "--explain")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == f"saved to {file}\n" and result.stdout == ""
    words = Outline(file.read_text()).words
    told = json.loads(invoke("explain", plan_files[name], "--json").stdout)
    for each in told["baselines"]:
        assert f"{each['name']} {format_seconds(each['outcome']['step_s'])}" in words
    assert "alpa-lite report --explain" not in words
    assert ("Over the step" in words) == (name == "one")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("no.json",), "no plan file at"),
        (("PLAN", "-o", "/no/such/folder/x.html"), "there is no folder /no/such/folder"),
        (("PLAN", "-o", "FOLDER"), "cannot be written"),
        (("PLAN", "-o", "FOLDER/x.html", "--explain", "--target", "gpt-test"), "was made from"),
    ],
)
def test_bad_input_is_3(invoke, plan_files, arguments, expected, tmp_path):
    named = {"PLAN": str(plan_files["one"])}
    arguments = [named.get(a, a).replace("FOLDER", str(tmp_path)) for a in arguments]
    result = invoke("report", *arguments)
    assert result.exit_code == 3, result.output
    assert expected in result.stderr and result.stdout == ""
