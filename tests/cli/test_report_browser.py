"""The report in a browser: no error, every section drawn, search, widths, keyboard, dark."""

import pytest

from tests.cli.browser import CHROMIUM, DRIVER, Browser
from tests.passes.test_html import SECTIONS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here"),
]

TAB, ESCAPE = "\ue004", "\ue00c"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


@pytest.fixture(scope="module", params=["one", "staged"])
def page(request, plan_files, tmp_path_factory):
    import typer.testing

    from alpa_lite.cli.app import app

    file = tmp_path_factory.mktemp("report") / "report.html"
    arguments = ["report", str(plan_files[request.param]), "-o", str(file), "--explain"]
    result = typer.testing.CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    return file.as_uri()


@pytest.mark.parametrize("width", [400, 1600])
def test_every_section_is_drawn_and_nothing_overflows(browser, page, width):
    browser.open(page, width)
    drawn = browser.run(
        "return [...document.querySelectorAll('main section')].map("
        "s => [s.id, s.getBoundingClientRect().width, s.getBoundingClientRect().height])"
    )
    assert {name for name, _, _ in drawn} == SECTIONS
    assert all(0 < w <= width and h > 50 for _, w, h in drawn)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    shapes = browser.run(
        "return [...document.querySelectorAll('svg')].map("
        "s => [s.getBoundingClientRect().width, s.querySelectorAll('rect, path').length])"
    )
    assert len(shapes) >= 3 and all(w > 100 and n > 0 for w, n in shapes)
    small = browser.run(
        "return [...document.querySelectorAll('main *')].filter(e => e.children.length === 0 &&"
        " e.textContent.trim() && e.namespaceURI.endsWith('xhtml') &&"
        " parseFloat(getComputedStyle(e).fontSize) < 12).length"
    )
    assert small == 0
    assert browser.messages() == []


def test_search(browser, page):
    browser.open(page, 1000)
    shown = (
        "return [...document.querySelectorAll('#layouts tbody tr')].filter(r => !r.hidden)"
        ".map(r => r.textContent)"
    )
    every = browser.run(shown)
    browser.run("document.getElementById('layout-search').focus()")
    browser.press("params W")
    found = browser.run(shown)
    expected = [text for text in every if "params" in text and "w" in text.lower()]
    assert found == expected and 0 < len(found) < len(every)
    count = browser.run("return document.getElementById('layout-count').textContent")
    assert count == f"{len(found)} of {len(every)}"
    browser.press(ESCAPE)
    assert browser.run(shown) == every
    browser.press("no such thing")
    assert browser.run(shown) == []
    assert browser.messages() == []


def test_keyboard(browser, page):
    """Tab reaches the skip link first, then sections, search, tables and details, all outlined."""
    browser.open(page, 1000)
    seen = []
    for _ in range(60):
        browser.press(TAB)
        seen.append(
            browser.run(
                "const e = document.activeElement; return [e.tagName, e.className || e.id,"
                " getComputedStyle(e).outlineStyle]"
            )
        )
        if seen[-1][0] == "SUMMARY":
            break
    assert seen[0][:2] == ["A", "skip"]
    assert {name for name, _, _ in seen} >= {"A", "INPUT", "DIV", "SUMMARY"}
    assert all(style != "none" for name, _, style in seen if name != "BODY")


def test_dark(browser, page):
    colours = []
    for dark in (False, True):
        browser.open(page, 1000, dark=dark)
        colours.append(
            browser.run(
                "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
            )
        )
    (light, _), (night, words) = (
        [sum(map(int, c[4:-1].split(","))) for c in pair] for pair in colours
    )
    assert light == 3 * 255 and night < 3 * 64 and words > 3 * 192
