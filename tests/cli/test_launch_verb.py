"""`alpa-lite launch`: its options, and the codes it exits with."""

import sys

import pytest

SHOW = "import os, sys; print(os.environ['ALPA_LITE_PROCESS_ID'], *sys.argv[1:])"


@pytest.fixture
def calls(monkeypatch):
    """What `launch_local` was called with; it returns 7."""
    found = []

    def launch_local(*arguments, **options):
        found.append((*arguments, options))
        return 7

    monkeypatch.setattr("alpa_lite.cli.launch.launch_local", launch_local)
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-n", 2, "--", "prog", "-n", "3"], (2, ["prog", "-n", "3"], 1, None)),
        (["-n", 2, "prog", "--timeout", "3"], (2, ["prog", "--timeout", "3"], 1, None)),
        (
            ["--num-processes", 4, "--devices-per-process", 2, "--timeout", 1.5, "--", "prog"],
            (4, ["prog"], 2, 1.5),
        ),
        (["-n", 1, "--", "prog", "--", "x"], (1, ["prog", "--", "x"], 1, None)),
    ],
)
def test_options_end_where_the_command_begins(invoke, calls, arguments, expected):
    assert invoke("launch", *arguments).exit_code == 7
    assert calls == [(*expected, {"platform": "cpu"})]


def test_platform(invoke, calls):
    assert invoke("launch", "-n", 1, "--platform", "cuda", "prog").exit_code == 7
    assert calls == [(1, ["prog"], 1, None, {"platform": "cuda"})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prog"], "--num-processes"),
        (["-n", 2], "COMMAND"),
        (["-n", 0, "prog"], "'--num-processes'"),
        (["-n", 1, "--devices-per-process", 0, "prog"], "'--devices-per-process'"),
        (["-n", 1, "--platform", "abacus", "prog"], "'abacus' is not one of"),
        (["-n", 1, "no-such-program"], "cannot start 'no-such-program'"),
    ],
)
def test_bad_input_is_3(invoke, arguments, message):
    result = invoke("launch", *arguments)
    assert result.exit_code == 3
    assert message in result.stderr


def test_too_few_gpus(invoke, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    result = invoke("launch", "-n", 2, "--platform", "cuda", sys.executable, "-c", "pass")
    assert result.exit_code == 3
    assert "process 1 needs 1 GPU" in result.stderr


def test_processes_of_a_command(invoke):
    result = invoke("launch", "-n", 2, "--", sys.executable, "-c", SHOW, "--flag")
    assert result.exit_code == 0
    assert sorted(result.stdout.splitlines()) == ["[0] 0 --flag", "[1] 1 --flag"]


def test_code_of_the_process_that_failed(invoke):
    result = invoke("launch", "-n", 1, "--", sys.executable, "-c", "import sys; sys.exit(5)")
    assert (result.exit_code, result.stdout) == (5, "process 0 exited with 5\n")
