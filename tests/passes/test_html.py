"""Reports and notebook views: everything of the plan is there, escaped, and nothing is fetched."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from alpa_lite.passes.html import plan_snippet, report_page, timeline_snippet
from alpa_lite.passes.html.charts import Bar, Span, area, bar, timeline
from alpa_lite.passes.html.elements import Html, join, table, tag
from alpa_lite.passes.pipeline_timeline import plan_timeline
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.schedules import equal_times, make_schedule, simulate
from tests.passes.test_pipeline_timeline import planned
from tests.passes.test_plan_text import PLAN

SECTIONS = {
    "summary", "timeline", "memory", "layouts", "communication", "cost", "alternatives",
    "assumptions",
}  # fmt: skip
VOID = {"meta", "input"}


class Outline(HTMLParser):
    """Checks that elements nest, and notes what is in them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.text, self.links = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        self.tags.append((name, given))
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[k] for k in ("href", "src") if k in given]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open and self.open[-1] == name, f"</{name}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def staged():
    return planned("1f1b").plan


def test_elements_escape():
    assert tag("p", "<b>", title='"x"') == '<p title="&quot;x&quot;">&lt;b&gt;</p>'
    assert tag("p", Html("<b></b>"), hidden=True, class_=None) == "<p hidden><b></b></p>"
    assert tag("meta", name="a", http_equiv="b") == '<meta name="a" http-equiv="b">'
    assert join("a\x1b[2J", Html("<i>")) == "a\\x1b[2J<i>"
    assert "<td>&lt;x&gt;</td>" in table(["h"], [["<x>"]])


def test_bar_is_as_long_as_its_parts():
    text = bar([Bar("a", 1.0, "1", "c-a"), Bar("b", 3.0, "3", "c-b")], 4.0, "both")
    assert re.findall(r'x="([\d.]+)" y="0" width="([\d.]+)"', text) == [
        ("0.00", "250.00"), ("250.00", "750.00"),
    ]  # fmt: skip
    assert 'aria-label="both: a 1, b 3"' in text


def test_timeline_is_to_scale():
    text = timeline([("m", [Span("s", 0.25, 0.75, "c")])], 1.0, "t")
    assert 'x="250.00" y="0" width="500.00"' in text
    assert Outline(text).words.startswith("m s: 500 ms from 250 ms")


def test_area_stacks_steps_and_draws_the_limit():
    text = area([("a", "c-a", [(0.0, 100.0), (0.5, 50.0)])], 1.0, 108.0, "memory")
    (path,) = re.findall(r'd="M([^"]*)Z"', text)
    points = [tuple(map(float, p.split())) for p in path.split("L")]
    height = 160 * (1 - 100 / 108)
    lower = 160 * (1 - 50 / 108)
    expected = [(0, height), (500, height), (500, lower), (1000, lower)]
    assert points[:4] == [pytest.approx(point, abs=0.01) for point in expected]
    assert points[-1] == (0, 160)
    assert 'class="limit"' in text
    assert 'class="limit"' not in area([("a", "c", [(0.0, 1.0)])], 1.0, 1e9, "memory")


@pytest.mark.parametrize("kind", ["one", "staged"])
def test_report_has_every_section(kind, staged):
    plan = PLAN if kind == "one" else staged
    found = Outline(report_page(plan))
    assert set(found.ids) > SECTIONS
    assert len(set(found.ids)) == len(found.ids)
    assert {f"#{name}" for name in SECTIONS} == set(found.links)
    labels = [given for name, given in found.tags if name == "svg"]
    assert labels and all(given["aria-label"] for given in labels)
    assert plan.cluster.device.name in found.words and plan.method in found.words
    headers = [given for name, given in found.tags if name == "th"]
    assert all(given.get("scope") == "col" for given in headers)


def test_report_fetches_nothing(staged):
    for plan in (PLAN, staged):
        text = report_page(plan)
        policy = next(g["content"] for n, g in Outline(text).tags if "http-equiv" in g)
        assert policy.startswith("default-src 'none';")
        assert not re.search(r"(src|href)=[\"'](?!#)|@import|url\(", text)


def test_every_input_is_in_the_report(staged):
    one = Outline(report_page(PLAN)).words
    assert all(path in one for path in PLAN.inputs)
    assert "state.params.Block_7.Dense_0.kernel - tp 4" in one
    many = Outline(report_page(staged)).words
    for stage in staged.stages:
        assert all(path in many for path in stage.plan.inputs)


def test_figures_of_the_plan_are_in_the_report():
    words = Outline(report_page(PLAN)).words
    assert "250 ms per step" in words
    assert "all_reduce dp+tp 48 1 MiB 50 ms" in words
    assert "compute 200 ms 80.0%" in words
    assert "8 - 3 GiB short." in words.replace(" 1 - ", " - ", 1)


def test_timeline_of_a_long_pipeline_is_cut_and_says_so():
    found = simulate(make_schedule("1f1b", 8, 2048), equal_times(8))
    text = timeline_snippet(found)
    assert 5_000 < text.count("<rect") < 13_000
    assert "of 2048." in Outline(text).words


def test_hostile_names_are_text():
    evil = "</title><script>alert(1)</script><img src=x onerror=alert(2)>"
    plan = replace(
        PLAN, name=evil, method=evil, notes=(evil,), configuration={evil: evil},
        inputs={evil: PLAN.inputs["batch.tokens"]}, versions={evil: evil},
    )  # fmt: skip
    page = report_page(Plan.from_json(plan.to_json()))
    assert [name for name, _ in Outline(page).tags].count("script") == 1
    assert "<img" not in page
    assert "<img" not in plan_snippet(plan)


def test_what_notebooks_show(staged):
    for value in (PLAN, staged, plan_timeline(staged)):
        shown = value._repr_html_()
        found = Outline(shown)
        assert [name for name, _ in found.tags][:2] == ["div", "style"]
        assert "script" not in [name for name, _ in found.tags]
        assert not found.ids  # a notebook shows many
    assert PLAN.describe().splitlines()[-1].strip() in Outline(PLAN._repr_html_()).text[-1]


def test_graph_in_a_notebook():
    import jax.numpy as jnp

    from alpa_lite.ir.trace import trace

    graph = trace(lambda x: jnp.where(x < 0, x, -x), jnp.ones(3), name="<f>").graph
    found = Outline(graph._repr_html_())
    assert "graph <f>" in found.text[0]
    assert str(graph) in found.text[1]
