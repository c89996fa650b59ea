"""`alpa-lite doctor`: each thing that may be wrong, planted, found, with what to do."""

import json
import subprocess
from dataclasses import replace

import pytest

from alpa_lite.cli import health
from alpa_lite.cli.health import NOTE, OK, PROBLEM, Devices, Facts, diagnose, satisfies

FINE = Facts(
    python=(3, 12, 1),
    packages={"alpa-lite": "0.1.0", "jax": "0.11.0", "jaxlib": "0.11.0", "highspy": "1.15",
              "jax-cuda13-plugin": "0.11.0"},
    jax_requirement="jax<0.13,>=0.10.2",
    devices=Devices(platform="gpu", count=8, kind="NVIDIA H100 80GB HBM3"),
    num_nvidia_gpus=8, num_cpus=64,
    environment={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}, solvers=("highs",),
)  # fmt: skip


def without(*names):
    return {k: v for k, v in FINE.packages.items() if k not in names}


def test_nothing_to_say():
    assert {f.status for f in diagnose(FINE)} == {OK}
    assert not any(f.advice for f in diagnose(FINE))


CPU = Devices(platform="cpu", count=1, kind="cpu")


@pytest.mark.parametrize(
    ("changes", "name", "status", "advice"),
    [
        ({"devices": CPU, "num_nvidia_gpus": 0}, "accelerator", NOTE, "--cluster h100:4x8"),
        (
            {"devices": CPU, "environment": {"JAX_PLATFORMS": "cpu"}},
            "accelerator", NOTE, "JAX_PLATFORMS=cpu hides accelerators",
        ),
        (
            {"devices": Devices(platform="", count=0, kind="", error="no such backend")},
            "accelerator", PROBLEM, "JAX_PLATFORMS=cpu",
        ),
        ({"packages": FINE.packages | {"jax": "0.13.0"}}, "JAX", PROBLEM, "jax<0.13,>=0.10.2"),
        ({"packages": FINE.packages | {"jax": "0.10.1"}}, "JAX", PROBLEM, "jax<0.13,>=0.10.2"),
        ({"packages": FINE.packages | {"jax": "0.11.1"}}, "JAX", NOTE, "jaxlib==0.11.1"),
        ({"packages": without("jaxlib")}, "JAX", PROBLEM, "pip install -U 'jax<0.13"),
        ({"packages": without("jax-cuda13-plugin")}, "GPU plugin", PROBLEM, "alpa-lite[cuda13]"),
        (
            {"packages": without("jax-cuda13-plugin"), "num_nvidia_gpus": 0},
            "GPU plugin", NOTE, "alpa-lite[gpu-aot]",
        ),
        (
            {"packages": FINE.packages | {"jax-cuda13-plugin": "0.10.2"}},
            "GPU plugin", PROBLEM, "of jaxlib's version, 0.11.0",
        ),
        (
            {"environment": {"JAX_NUM_CPU_DEVICES": "8", "PJRT_NPROC": "12"}},
            "CPU threads", PROBLEM, "PJRT_NPROC=32",
        ),
        (
            {"environment": {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8"},
             "num_cpus": 2},
            "CPU threads", PROBLEM, "fewer than 16 threads",
        ),
        ({"solvers": ("cbc",)}, "solver", PROBLEM, "pip install highspy"),
        ({"environment": {}}, "GPU memory", NOTE, "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"),
        ({"python": (3, 10, 4)}, "Python", PROBLEM, "3.11"),
    ],
)  # fmt: skip
def test_finds(changes, name, status, advice):
    by_name = {f.name: f for f in diagnose(replace(FINE, **changes))}
    assert by_name[name].status == status
    assert advice in by_name[name].advice


def test_enough_threads_are_fine():
    environment = {"JAX_NUM_CPU_DEVICES": "8", "NPROC": "16"}
    found = {f.name: f for f in diagnose(replace(FINE, environment=environment))}
    assert found["CPU threads"].status == OK
    assert found["CPU threads"].found == "16 threads for 8 virtual CPU devices"


@pytest.mark.parametrize(
    ("version", "requirement", "expected"),
    [
        ("0.10.2", "jax<0.13,>=0.10.2", True),
        ("0.12.9.dev1", "jax<0.13,>=0.10.2", True),
        ("0.13", "jax<0.13,>=0.10.2", False),
        ("0.9.9", "jax<0.13,>=0.10.2", False),
        ("1.0", "jax", True),
        ("0.11.0", "jax!=0.11.0", False),
        ("0.11", "jax==0.11.0; python_version > '3'", True),
    ],
)
def test_version_windows(version, requirement, expected):
    assert satisfies(version, requirement) is expected


def test_verb(invoke, monkeypatch):
    monkeypatch.setattr("alpa_lite.cli.doctor.gather", lambda: replace(FINE, solvers=()))
    result = invoke("doctor", "--json")
    assert result.exit_code == 1
    found = {each["name"]: each for each in json.loads(result.stdout)}
    assert all(set(each) == {"name", "status", "found", "advice"} for each in found.values())
    assert found["solver"]["status"] == "problem" and found["JAX"]["status"] == "ok"
    text = invoke("doctor")
    assert text.exit_code == 1
    assert "problem  solver" in text.stdout and "pip install highspy" in text.stdout


def test_a_backend_that_hangs_or_crashes_is_a_finding(monkeypatch):
    monkeypatch.setattr(health, "_PROBE", "raise RuntimeError('no luck')")
    assert health._probe_devices().error == "RuntimeError: no luck"
    monkeypatch.setattr(health, "_PROBE", "import os; os.abort()")
    assert health._probe_devices().error == "it ended with -6"

    def late(*args, **options):
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(subprocess, "run", late)
    assert "did not come up" in health._probe_devices().error


def test_this_installation(invoke):
    """Of the tests themselves: 8 virtual devices with enough threads, HiGHS, a JAX that fits."""
    result = invoke("doctor", "--json")
    found = {each["name"]: each for each in json.loads(result.stdout)}
    assert found["JAX"]["status"] in ("ok", "note")
    assert found["solver"]["status"] == found["CPU threads"]["status"] == "ok"
    assert found["accelerator"]["status"] in ("ok", "note")
    assert "device" in found["CPU threads"]["found"]
