"""The program as a whole: help, version, exit codes of the process, and what it leaves alone."""

import importlib
import json
import tomllib

import pytest
import typer.testing

from alpa_lite.cli.app import app
from alpa_lite.errors import InfeasibleError, PlanError, SolverTimeoutError
from alpa_lite.version import __version__

VERBS = "plan show explain diff whatif simulate report train launch models clusters doctor".split()
OWN = ("plan", "tests.cli.own_steps:linear", "--cluster", "h100:8")


def test_console_script(request):
    project = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["alpa-lite"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_verbs(invoke, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert all(f"\n  {verb} " in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(invoke, verb):
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    assert f"Example: alpa-lite {verb}" in result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell):
    result = typer.testing.CliRunner().invoke(
        app, [], prog_name="alpa-lite", env={"_ALPA_LITE_COMPLETE": f"source_{shell}"},
        complete_var="_ALPA_LITE_COMPLETE",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "_ALPA_LITE_COMPLETE" in result.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("alpa-lite wh", ["whatif"]),
        ("alpa-lite show --a", ["--as"]),
        ("alpa-lite show --as m", ["maxtext", "megatron"]),
        ("alpa-lite plan llama3-", ["llama3-405b", "llama3-70b", "llama3-8b"]),
    ],
)
def test_completion(line, expected):
    environment = {"_TYPER_COMPLETE_ARGS": line, "_ALPA_LITE_COMPLETE": "complete_fish"}
    environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    result = typer.testing.CliRunner().invoke(
        app, [], prog_name="alpa-lite", env=environment, complete_var="_ALPA_LITE_COMPLETE"
    )
    assert sorted(text.split("\t")[0] for text in result.stdout.split("\n") if text) == expected


def test_version(invoke):
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"{__version__}\n")


def test_unknown_verb_is_3(invoke):
    result = invoke("plam")
    assert result.exit_code == 3
    assert "Did you mean 'plan'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--memory-budget", "1KiB"), 2, "error: No choice of strategies fits"),
        (("--mesh", "many"), 3, "error: --mesh 'many'"),
    ],
)
def test_exit_codes_of_the_process(run_program, arguments, code, message):
    result = run_program(*OWN, *arguments)
    assert result.returncode == code
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr


IN_ONE_PROCESS = """
import contextlib, io, json, sys
from jax._src import xla_bridge
from alpa_lite.cli import listings
from alpa_lite.cli.app import app
listings.presets = lambda: ("gpt-test", "moe-test", "mlp-test")
started = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        assert app(arguments, standalone_mode=False) == 0
    started.append(xla_bridge.backends_are_initialized())
print(json.dumps(started))
"""


@pytest.fixture(scope="module")
def backends_started(run_program, tmp_path_factory):
    """Verb -> whether a JAX backend runs after it and the verbs before it."""
    file = str(tmp_path_factory.mktemp("plans") / "plan.json")
    made = run_program(*OWN, "-o", file)
    assert made.returncode == 0, made.stderr
    commands = [
        ["clusters"],
        ["show", file],
        ["simulate", file],
        ["diff", file, file],
        ["report", file, "-o", f"{file}.html"],
        ["models"],
        [*OWN],
    ]
    result = run_program(json.dumps(commands), code=IN_ONE_PROCESS)
    assert result.returncode == 0, result.stderr
    return dict(zip((c[0] for c in commands), json.loads(result.stdout), strict=True))


@pytest.mark.parametrize(
    "verb",
    [
        "clusters",
        "show",
        "simulate",
        "diff",
        "report",
        "models",
        "plan",
    ],
)
def test_no_device_is_started(backends_started, verb):
    assert not backends_started[verb]


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (InfeasibleError("too large"), 2, "error: too large\n"),
        (SolverTimeoutError("too slow"), 1, "error: too slow\n"),
        (PlanError("odd"), 3, "error: odd\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_code_of_an_error(invoke, monkeypatch, error, code, stderr):
    monkeypatch.setattr("alpa_lite.cli.listings.cluster_presets", raises(error))
    result = invoke("clusters")
    assert (result.exit_code, result.stderr) == (code, stderr)


def test_a_bug_keeps_its_traceback(invoke, monkeypatch):
    monkeypatch.setattr("alpa_lite.cli.listings.cluster_presets", raises(ValueError("a bug")))
    result = invoke("clusters")
    assert isinstance(result.exception, ValueError)
    assert result.stderr == ""


def raises(error):
    def function():
        raise error

    return function
