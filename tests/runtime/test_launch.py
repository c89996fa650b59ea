"""Starting several processes on this machine: their environment, output, and how they end."""

import io
import os
import sys
import textwrap
import time

import pytest

from alpa_lite.runtime import distributed, launch
from alpa_lite.runtime.launch import TIMEOUT_CODE, launch_local, process_environment
from alpa_lite.runtime.watchdog import LOST_CODE

SHOW = "import os; print(os.environ['ALPA_LITE_PROCESS_ID'], 'here')"


def run(
    code: str, num_processes: int = 2, timeout_s: float = 20, **options
) -> tuple[int, list[str]]:
    """Exit code and lines of a Python program in some processes."""
    output = io.StringIO()
    command = [sys.executable, "-c", textwrap.dedent(code)]
    status = launch_local(num_processes, command, 1, timeout_s, output=output, **options)
    return status, output.getvalue().splitlines()


def test_lines_are_shown_with_their_process():
    status, lines = run(SHOW, 3)
    assert status == 0
    assert sorted(lines) == ["[0] 0 here", "[1] 1 here", "[2] 2 here"]


def test_errors_are_shown_as_well():
    status, lines = run("import sys; sys.stderr.write('wrong\\n')", 1)
    assert (status, lines) == (0, ["[0] wrong"])


def test_first_failure_ends_the_others():
    begin_s = time.monotonic()
    status, lines = run(
        """
        import os, sys, time
        if os.environ["ALPA_LITE_PROCESS_ID"] == "1":
            sys.exit(7)
        time.sleep(60)
        """,
        3,
        grace_s=0.1,
    )
    assert status == 7
    assert lines == ["process 1 exited with 7"]
    assert time.monotonic() - begin_s < 15


def test_signals_are_codes_above_128():
    status, lines = run("import os; os.kill(os.getpid(), 9)", 1)
    assert (status, lines) == (137, ["process 0 was ended by SIGKILL"])


def test_the_cause_counts_not_what_follows_from_it():
    status, lines = run(
        f"""
        import os, sys, time
        if os.environ["ALPA_LITE_PROCESS_ID"] == "1":
            time.sleep(0.3)
            sys.exit(5)
        sys.exit({LOST_CODE})
        """
    )
    assert status == 5
    assert lines[0] == f"process 0 exited with {LOST_CODE}, because of another one"


def test_time_runs_out():
    """And processes that do not listen are killed, with those that they have started."""
    status, lines = run("import time; time.sleep(60)", timeout_s=0.3)
    assert status == TIMEOUT_CODE
    assert lines == ["not done after 0.3 s; ending all processes"]


def test_processes_that_do_not_listen_are_killed(monkeypatch):
    monkeypatch.setattr(launch, "_END_S", 0.5)
    status, _ = run(
        """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        """,
        timeout_s=0.5,
    )
    assert status == TIMEOUT_CODE


def test_what_a_process_has_started_ends_with_it():
    status, lines = run(
        """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        time.sleep(60)
        """,
        1,
        timeout_s=1.0,
    )
    assert status == TIMEOUT_CODE
    child = int(lines[0].split()[1])
    for _ in range(50):
        if not is_running(child):
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} still runs")


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be collected."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_command_that_does_not_exist():
    with pytest.raises(FileNotFoundError):
        launch_local(1, ["no-such-command"], 1, 5)


def test_environment_on_the_cpu():
    before = {"XLA_FLAGS": "--xla_a=1", "JAX_NUM_CPU_DEVICES": "3", "PJRT_NPROC": "1", "HOME": "/h"}
    after = process_environment(1, 4, 1234, 2, "cpu", before)
    assert after == {
        "ALPA_LITE_COORDINATOR": "127.0.0.1:1234",
        "ALPA_LITE_NUM_PROCESSES": "4",
        "ALPA_LITE_PROCESS_ID": "1",
        "HOME": "/h",
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": "8",
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=2",
    }


@pytest.mark.parametrize(("visible", "own"), [(None, "2,3"), ("7,5,3,1", "3,1")])
def test_environment_with_gpus(visible, own):
    before = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert process_environment(1, 2, 1, 2, "cuda", before)["CUDA_VISIBLE_DEVICES"] == own


def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match="at least one process"):
        launch_local(0, ["true"], 1, 1)
    with pytest.raises(ValueError, match='"cpu" or "cuda", found'):
        process_environment(0, 1, 1, 1, "abacus", {})
    with pytest.raises(ValueError, match="process 1 needs 2 GPU"):
        process_environment(1, 2, 1, 2, "cuda", {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_variables_belong_together(monkeypatch):
    monkeypatch.setenv(distributed.COORDINATOR, "127.0.0.1:1")
    monkeypatch.delenv(distributed.NUM_PROCESSES, raising=False)
    monkeypatch.setenv(distributed.PROCESS_ID, "0")
    with pytest.raises(ValueError, match="ALPA_LITE_NUM_PROCESSES"):
        distributed.initialize()


@pytest.mark.slow
@pytest.mark.parametrize("launched", [True, False])
def test_initialize(launched):
    """In processes of the launcher; and alone, where it leaves everything as it is."""
    program = """
        import os
        if not LAUNCHED:
            for name in list(os.environ):
                if name.startswith("ALPA_LITE_"):
                    del os.environ[name]
        import jax
        from alpa_lite.runtime.distributed import initialize
        process = initialize()
        assert initialize() == process
        print(process.id, process.count, len(jax.local_devices()), len(jax.devices()))
        """
    output = io.StringIO()
    command = [sys.executable, "-c", textwrap.dedent(program.replace("LAUNCHED", str(launched)))]
    assert launch_local(2, command, 3, 60, output=output) == 0
    lines = sorted(line for line in output.getvalue().splitlines() if line[4:5].isdigit())
    expected = ["[0] 0 2 3 6", "[1] 1 2 3 6"] if launched else ["[0] 0 1 3 3", "[1] 0 1 3 3"]
    assert lines == expected


def test_children_see_this_environment(monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "17")
    status, lines = run("import os; print(os.environ['SOME_VARIABLE'])", 1)
    assert (status, lines) == (0, ["[0] 17"])
    assert "ALPA_LITE_PROCESS_ID" not in os.environ
