"""Pipelines in several processes: the same results as in one, and how they end if they differ."""

import functools
import os
import re
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import alpa_lite
from alpa_lite.runtime.watchdog import LOST_CODE
from tests.import_graph import ROOT
from tests.runtime import pipeline_processes
from tests.runtime.pipeline_processes import CASES, STEPS, grid, run_case
from tests.runtime.random_plans import QUICK_COMPILE, quick_compilation
from tests.runtime.run_processes import run

run_pipelines = functools.partial(
    run, programs=Path(pipeline_processes.__file__), timeout_s=400, grace_s=20
)


def results(num_processes: int, devices: int, case: str, folder: Path) -> list[dict]:
    """What the processes have of a case, fetched in each of them."""
    quick = " ".join(f"--{name}={value}" for name, value in QUICK_COMPILE.items())
    with mock.patch.dict(os.environ, {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {quick}"}):
        code, output = run_pipelines(num_processes, devices, "case", case, str(folder))
    assert code == 0, output
    return [dict(np.load(folder / f"{i}.npz")) for i in range(num_processes)]


def assert_same(found: dict, wanted: dict) -> None:
    assert set(found) == set(wanted)
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype, name
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_processes_with_a_device_each(tmp_path):
    """Against the plain step on one device."""
    function, new_state, new_batch = CASES["plain"][0]()
    state, wanted = new_state(), {}
    for seed in range(STEPS):
        state, aux = jax.jit(function)(state, new_batch(seed))
        wanted |= pipeline_processes._values(f"step {seed}", aux)
    wanted |= pipeline_processes._values("state", state)
    for found in results(2, 1, "plain", tmp_path):
        assert_same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "devices", "case"),
    [
        (2, 4, "1f1b"),
        (4, 2, "1f1b"),  # a stage on two processes
        (4, 2, "zb-h1"),
        (2, 4, "interleaved"),
        (2, 4, "chimera"),  # parameters on two meshes
        (2, 4, "uneven"),  # the second stage on half of each process
        (2, 4, "gpt"),
        (4, 2, "scan"),  # stacked parameters on all processes
        (2, 4, "one stage"),
    ],
)
def test_same_as_in_one_process(num_processes, devices, case, tmp_path):
    wanted = reference(case)
    for found in results(num_processes, devices, case, tmp_path):
        assert_same(found, wanted)


@functools.cache
def reference(case: str) -> dict:
    with quick_compilation():
        return run_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim):
    code, output = run_pipelines(2, 1, "killed", str(victim))
    end_s = time.time()
    assert code == 128 + 9, output
    assert end_s - float(re.search(r"dies at ([\d.]+)", output)[1]) < 10
    other = 1 - victim
    assert re.search(rf"\[{other}\] .*process {victim} \(host .+\) was lost", output), output
    assert f"process {other} exited with {LOST_CODE}" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_in_one_process_ends_the_others(victim):
    code, output = run_pipelines(2, 1, "failed", str(victim))
    assert code == 1, output
    assert f"[{victim}] RuntimeError: no luck" in output
    text = rf"\[{1 - victim}\] .*process {victim} \(host .+\) failed: RuntimeError: no luck"
    assert re.search(text, output), output


@pytest.mark.slow
def test_processes_that_disagree(tmp_path):
    function, new_state, new_batch = CASES["plain"][0]()
    for i, schedule in enumerate(("1f1b", "gpipe")):
        parallel = alpa_lite.parallelize(
            function, method=grid(1, 1, 2, schedule=schedule), cluster="cpu:2"
        )
        parallel.plan(jax.eval_shape(new_state), new_batch(0)).save(tmp_path / f"{i}.json")
    code, output = run_pipelines(2, 1, "disagree", str(tmp_path))
    assert code == 0, output
    for process in (0, 1):
        lines = re.findall(rf"\[{process}\] (.*)", output)
        differs, too_many, one_given, steps, agreed, _ = lines[1:]
        assert "process 1 (host" in differs and "schedule of the plan" in differs
        assert "graph_hash" not in differs
        assert "6 devices; the cluster has 2" in too_many
        assert "schedule of the plan" in one_given
        assert "another step" in steps
        assert agreed == "agreed on 1f1b"


@pytest.mark.slow
def test_the_program_of_the_how_to(tmp_path):
    text = (ROOT / "docs/howto/several-processes.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    path = tmp_path / "train.py"
    path.write_text(program)
    code, output = run_pipelines(2, 2, programs=path)
    assert code == 0, output
    losses = [float(x) for x in re.findall(r"\[0\] step \d, loss ([\d.]+)", output)]
    assert len(losses) == 5 and losses[-1] < losses[0]


@pytest.mark.slow
def test_arrays_over_processes():
    code, output = run_pipelines(2, 2, "arrays")
    assert code == 0, output
    assert output.count("lies on devices of other processes") == 2
