"""`benchmarks.options`: which cases a command line chooses."""

import json

import pytest

from benchmarks import apart, planning_time
from benchmarks.options import parse_options

CASES = ("small, 1x8", "large, 2x8", "huge, 8x8")


def parse(*arguments, **more):
    return parse_options("Measures something.", CASES, arguments=arguments, **more)


@pytest.mark.parametrize(
    ("arguments", "chosen", "save"),
    [
        ((), CASES, True),
        (("--quick",), CASES[:1], False),
        (("--only", "huge, 8x8", "small, 1x8"), ("small, 1x8", "huge, 8x8"), False),
        (("--only", "huge, 8x8", "small, 1x8", "--quick"), ("small, 1x8",), False),
    ],
)
def test_chosen_cases(arguments, chosen, save):
    found = parse(*arguments)
    assert found.chosen == chosen
    assert found.save == save
    assert found.quick == ("--quick" in arguments)
    assert found.more == {}


def test_further_options():
    found = parse("--cluster", "a.json", cluster="a file", profile="a case")
    assert found.more == {"cluster": "a.json", "profile": None}
    assert found.save


def test_unknown_cases_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--only", "tiny")
    assert "there is no case 'tiny'; the cases are small, 1x8, large" in capsys.readouterr().err


def test_a_planning_case_runs_in_a_process_of_its_own(monkeypatch):
    """The child is told the case by its name, and answers in JSON."""
    case = planning_time.CASES[0]
    called = []

    class Done:
        returncode, stdout = 0, "warning\n" + json.dumps({"plan_s": 1.5})

    monkeypatch.setattr(apart.subprocess, "run", lambda c, **_: called.append(c) or Done)
    assert apart.run_apart("benchmarks.planning_time", case.name) == {"plan_s": 1.5}
    names = [c.name for c in planning_time.CASES]
    assert called[0][1:3] == ["-m", "benchmarks.planning_time"]
    assert parse_options("", names, arguments=called[0][3:], here="").more["here"] == case.name
