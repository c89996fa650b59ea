"""Pages agree with the code they describe; `make docs` builds them and runs the tutorials."""

import re
import sys

import pytest
import typer
import typer.testing

from alpa_lite.cli.app import app
from alpa_lite.cli.exits import BAD_INPUT, FAILED, INFEASIBLE, INTERRUPTED
from alpa_lite.passes.flag_names import AXES
from alpa_lite.passes.pipeline_plan import load_plan
from benchmarks.new_user import example
from tests.import_graph import ROOT

DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("[0-9]*.md"))


def table_rows(page, heading):
    text = (DOCS / page).read_text()
    part = text[text.index(heading) :].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_axes_are_called_what_the_code_says():
    expected = [[a.name, a.meaning, a.maxtext, a.megatron] for a in AXES]
    assert table_rows("from-others.md", "## Mesh axes") == expected
    assert [row[0] for row in table_rows("concepts.md", "## Axes")] == [a.name for a in AXES]


def test_every_verb_is_on_its_page():
    first = " ".join(row[0] for row in table_rows("cli.md", "| verb"))
    assert set(re.findall(r"[a-z]+", first)) == set(typer.main.get_command(app).commands)


def test_exit_codes_are_those_of_the_program():
    codes = [int(row[0]) for row in table_rows("cli.md", "## Exit codes")]
    assert codes == [0, FAILED, INFEASIBLE, BAD_INPUT, INTERRUPTED]


def test_links_between_pages_lead_somewhere():
    missing = []
    for page in DOCS.rglob("*.md"):
        if "_build" in page.parts:
            continue
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            if not (page.parent / link).exists():
                missing.append(f"{page.relative_to(ROOT)}: {link}")
    assert not missing


def test_the_step_of_the_quickstart_can_be_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "mine.py").write_text(example(DOCS / "quickstart.md"))
    command = ["plan", "mine:factory", "--cluster", "h100:8", "-o", "plan.json"]
    result = typer.testing.CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    plan = load_plan(tmp_path / "plan.json")
    assert set(plan.inputs) == {"params.up", "params.down", "batch.x", "batch.y"}
    assert plan.predicted.step_s > 0


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorials_are_text_notebooks_that_parse(page):
    text = page.read_text()
    assert text.startswith("---\njupytext:") and "kernelspec:" in text
    cells = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(cells) >= 3
    for number, cell in enumerate(cells):
        compile(cell, f"{page.name}, cell {number}", "exec")
    assert "assert" in text
