"""One program in several processes: `initialize`.

A wrapper of `jax.distributed.initialize` that needs no arguments: the environment says who takes
part. Either `alpa_lite.runtime.launch` has written it (`ENVIRONMENT`), or JAX reads that of SLURM,
MPI or Kubernetes.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import jax

from alpa_lite.compat import distributed_process

COORDINATOR = "ALPA_LITE_COORDINATOR"
"""`host:port` at which process 0 listens."""
NUM_PROCESSES = "ALPA_LITE_NUM_PROCESSES"
PROCESS_ID = "ALPA_LITE_PROCESS_ID"

HEARTBEAT_TIMEOUT_S = 30
"""After so many seconds of silence JAX ends the others; `watchdog` is sooner and says more."""


@dataclass(frozen=True, slots=True)
class Process:
    """This process among those of the program.

    Attributes:
      id: from 0 on; process 0 is the coordinator.
      count: number of processes.
    """

    id: int
    count: int


def initialize(*, timeout_s: int = 300) -> Process:
    """Join the other processes of this program, if there are any; call it before JAX is used.

    A second call does nothing.

    Args:
      timeout_s: how long to wait for the others, in seconds.

    Raises:
      ValueError: the environment names some of the variables and not the others.
      RuntimeError: JAX already runs.
    """
    if not jax.distributed.is_initialized():
        found = {name: os.environ.get(name) for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
        if any(found.values()):
            missing = [name for name, value in found.items() if not value]
            if missing:
                raise ValueError(f"{', '.join(missing)} must be set along with {COORDINATOR} ...")
            jax.distributed.initialize(
                found[COORDINATOR],
                num_processes=int(found[NUM_PROCESSES] or 0),
                process_id=int(found[PROCESS_ID] or 0),
                initialization_timeout=timeout_s,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
                cluster_detection_method="deactivate",
            )
        elif not _initialize_from_cluster(timeout_s):
            return Process(0, 1)
    me, count, _ = distributed_process() or (0, 1, "")
    return Process(me, count)


def own_address() -> str:
    """The address of this machine that the other processes reach it by.

    Raises:
      RuntimeError: `jax.distributed` is not initialised.
    """
    process = distributed_process()
    if process is None:
        raise RuntimeError("jax.distributed is not initialised in this process")
    host, _, port = process[2].rpartition(":")
    family, kind, _, _, where = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # of a datagram socket: sends nothing, chooses the way
        found: str = probe.getsockname()[0]
    return f"[{found}]" if family == socket.AF_INET6 else found


def _initialize_from_cluster(timeout_s: int) -> bool:
    """Whether JAX has found an environment that it knows, and has joined."""
    try:
        jax.distributed.initialize(
            initialization_timeout=timeout_s, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S
        )
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        return False
    return True
