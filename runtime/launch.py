"""Several processes of one command on this machine: `launch_local`.

They find each other with `alpa_lite.runtime.distributed.initialize()`. Between machines, the
launcher of the cluster (`srun`, `mpirun`, Kubernetes) takes this part.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, TextIO

from alpa_lite.runtime.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from alpa_lite.runtime.watchdog import LOST_CODE
from alpa_lite.virtual_devices import THREADS_PER_DEVICE, with_device_count

TIMEOUT_CODE = 124
"""What `launch_local` returns if time runs out, as the command `timeout` does."""

_POLL_S = 0.05
_END_S = 5.0
"""From asking a process to end to killing it, in seconds."""


def launch_local(
    num_processes: int, command: Sequence[str], devices_per_process: int, timeout_s: float | None,
    *, platform: str = "cpu", grace_s: float = 2.0, output: TextIO | None = None,
) -> int:  # fmt: skip
    """Run a command in several processes until all have ended.

    Their output is shown line by line, each after the number of its process. If one fails, the
    others are ended.

    Args:
      num_processes: how many.
      command: program and arguments, the same for all.
      devices_per_process: virtual CPU devices, or GPUs, that each of them sees.
      timeout_s: when to end them all, in seconds; None for never.
      platform: "cpu" or "cuda".
      grace_s: how long the others may go on after one has failed, to say what they know of it.
      output: where it is shown; standard output by default.

    Returns:
      0 if none failed; else the code of the first that did, unless that was because of another one
      (`watchdog.LOST_CODE`), and 128 plus the signal if it was ended by one; or `TIMEOUT_CODE`.

    Raises:
      ValueError: a number is less than 1, or the platform is another.
      OSError: the command cannot be started.
    """
    if num_processes < 1 or devices_per_process < 1:
        raise ValueError(
            f"at least one process and one device each, found {num_processes} and "
            f"{devices_per_process}"
        )
    shown = _Shown(output or sys.stdout)
    port = _free_port()
    processes: list[subprocess.Popen[str]] = []
    readers = []
    try:
        for i in range(num_processes):
            environment = process_environment(
                i, num_processes, port, devices_per_process, platform, os.environ
            )
            process = subprocess.Popen(
                list(command), env=environment, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                start_new_session=True,
            )  # fmt: skip
            processes.append(process)
            assert process.stdout is not None
            reader = threading.Thread(
                target=shown.follow, args=(f"[{i}] ", process.stdout), daemon=True
            )
            reader.start()
            readers.append(reader)
        return _wait(processes, timeout_s, grace_s, shown)
    finally:
        _end(processes)
        for reader in readers:
            reader.join(_END_S)  # what a process has started may hold its output open


def process_environment(
    process: int, num_processes: int, port: int, devices_per_process: int, platform: str,
    environment: Mapping[str, str],
) -> dict[str, str]:  # fmt: skip
    """The environment of one process.

    Args:
      process: which one.
      num_processes: how many there are.
      port: where process 0 shall listen.
      devices_per_process: devices that each process sees.
      platform: "cpu" or "cuda".
      environment: of this process.

    Raises:
      ValueError: the platform is another, or there are too few GPUs.
    """
    own = {
        **environment,
        COORDINATOR: f"127.0.0.1:{port}",
        NUM_PROCESSES: str(num_processes),
        PROCESS_ID: str(process),
        "PYTHONUNBUFFERED": "1",
    }
    if platform == "cpu":
        own["JAX_PLATFORMS"] = "cpu"
        own["XLA_FLAGS"] = with_device_count(environment.get("XLA_FLAGS", ""), devices_per_process)
        own.pop("JAX_NUM_CPU_DEVICES", None)  # would win over XLA_FLAGS
        own["PJRT_NPROC"] = str(THREADS_PER_DEVICE * devices_per_process)
    elif platform == "cuda":
        own["CUDA_VISIBLE_DEVICES"] = _own_gpus(
            process, devices_per_process, environment.get("CUDA_VISIBLE_DEVICES")
        )
    else:
        raise ValueError(f'platform must be "cpu" or "cuda", found {platform!r}')
    return own


def _own_gpus(process: int, count: int, visible: str | None) -> str:
    """The GPUs of one process, out of those that CUDA_VISIBLE_DEVICES leaves visible."""
    first = process * count
    if visible is None:
        return ",".join(str(i) for i in range(first, first + count))
    own = visible.split(",")[first : first + count]
    if len(own) < count:
        raise ValueError(
            f"process {process} needs {count} GPU(s) from number {first} on, out of "
            f"CUDA_VISIBLE_DEVICES={visible}"
        )
    return ",".join(own)


class _Shown:
    """Lines of several processes, one at a time."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._lock = threading.Lock()

    def line(self, text: str) -> None:
        with self._lock:
            self._output.write(f"{text}\n")
            self._output.flush()

    def follow(self, prefix: str, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self.line(prefix + line.rstrip("\n"))


def _wait(
    processes: Sequence[subprocess.Popen[str]], timeout_s: float | None, grace_s: float,
    shown: _Shown,
) -> int:  # fmt: skip
    """Wait for the end of all, or for one that fails and then for the grace; the code to return."""
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    ended: dict[int, int] = {}  # code of each process, in the order in which they end
    failed = False
    while len(ended) < len(processes):
        for i, process in enumerate(processes):
            if i not in ended and (code := process.poll()) is not None:
                ended[i] = code
                if code:
                    shown.line(f"process {i} {_ending(code)}")
        if any(ended.values()) and not failed:
            failed = True
            end_s = time.monotonic() + grace_s
        if end_s is not None and time.monotonic() > end_s:
            if not failed:
                shown.line(f"not done after {timeout_s:g} s; ending all processes")
                return TIMEOUT_CODE
            break
        time.sleep(_POLL_S)
    codes = [code for code in ended.values() if code]
    causes = [code for code in codes if code != LOST_CODE]
    code = next(iter(causes + codes), 0)
    return 128 - code if code < 0 else code


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with {code}" + (", because of another one" if code == LOST_CODE else "")


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """End what still runs, with what it has started."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        _signal(process, signal.SIGTERM)
    deadline_s = time.monotonic() + _END_S
    for process in running:
        try:
            process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
