import json
import re

import pytest

from alpa_lite.cli.trial import Difference
from alpa_lite.passes.plan import Plan

TINY = (
    "train", "--steps", 3, "--preset", "gpt-test", "--set", "num_layers=1", "--seq-len", 16,
    "--cluster", "cpu:8",
)  # fmt: skip


@pytest.mark.slow
def test_json(run_program):
    result = run_program(*TINY, "--json")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert set(data) == {
        "preset", "parameters", "platform", "devices", "losses", "step_s", "tokens_per_s",
        "one_device_step_s", "difference", "rounding", "allowed", "agrees", "plan",
    }  # fmt: skip
    assert (data["platform"], data["devices"], data["agrees"]) == ("cpu", 8, True)
    assert len(data["losses"]) == 3 and data["losses"][-1] < data["losses"][0]
    assert data["difference"]["loss"] < data["allowed"]["loss"] < 1e-3
    assert Plan.from_json(data["plan"]).mesh.num_devices == 8


def test_prints_plan_losses_and_comparison_and_fails_if_they_differ(invoke, monkeypatch):
    monkeypatch.setattr("alpa_lite.cli.train.allowed_difference", lambda *_: Difference(-1.0, -1.0))
    result = invoke(*TINY)
    assert result.exit_code == 1
    assert "differs from the plain one" in result.stderr
    assert "state.params.layer_0.mlp.up.kernel" in result.stdout
    assert re.findall(r"step +(\d+)   loss \d\.\d{3}", result.stdout) == ["1", "2", "3"]
    assert re.search(r"[\d,]+ tokens/s", result.stdout)
    assert "8 devices and one" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--preset", "mlp-test"), "mlp-test is not a language model"),
        (("--preset", "gpt-tset"), "Did you mean 'gpt-test'"),
        (("--set", "vocab_size=100"), "vocab_size of at least 256"),
        (("--cluster", "h100:4"), "has 4 devices; 8 are used here"),
        (("--steps", 0), "--steps"),
        (("--devices", 0), "--devices"),
    ],
)
def test_bad_input_is_3(invoke, arguments, expected):
    result = invoke("train", *arguments)
    assert result.exit_code == 3, result.output
    assert result.stderr.startswith("error: ") and expected in result.stderr


def test_platform_that_is_not_there(run_program):
    result = run_program("train", "--platform", "tpu9")
    assert result.returncode == 3
    assert result.stderr.splitlines()[-1].startswith("error: --platform tpu9: ")


@pytest.mark.slow
def test_demo(run_program):
    """`make demo`: measured devices, a loss that falls, and the same result on one device."""
    result = run_program("train", "--json")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    losses = data["losses"]
    assert sum(losses[-8:]) / 8 < 3.3 < 5.0 < losses[0]
    assert data["agrees"]
    assert data["plan"]["cluster"]["name"] == "calibrated-cpu:1x8"
