"""How tests call the program."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer.testing

from alpa_lite.cli.app import app

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def invoke():
    """Run a command in this process; the result has exit_code, stdout and stderr."""
    return lambda *arguments: typer.testing.CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="session")
def run_program():
    """Run a command as a user does; the result has returncode, stdout and stderr."""

    def run(*arguments, code=None):
        start = ["-c", code] if code else ["-m", "alpa_lite.cli"]
        return subprocess.run(
            [sys.executable, *start, *map(str, arguments)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def plan_files(tmp_path_factory):
    """Plan files made by `alpa-lite plan`: `one` has one mesh, `staged` has two stages."""
    folder = tmp_path_factory.mktemp("plans")
    commands = {
        "one": ["mlp-test", "--batch-size", "64", "--cluster", "h100:8"],
        "staged": [
            "mlp-test", "--batch-size", "16", "--cluster", "h100:8", "--method", "3d",
            "--mesh", "dp=4,pp=2",
        ],
    }  # fmt: skip
    for name, command in commands.items():
        path = folder / f"{name}.json"
        made = typer.testing.CliRunner().invoke(app, ["plan", *command, "-o", str(path)])
        assert made.exit_code == 0, made.stderr
    return {name: folder / f"{name}.json" for name in commands}
