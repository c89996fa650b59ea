"""The processes of one program: `ProcessGroup`, `distributed_initialize`.

Joined once per process and left at its end. From then on every process notices when another one is
lost or fails (`watchdog`). What they tell each other goes through the key-value store of
`jax.distributed`, arrays through a `Transport`.
"""

from __future__ import annotations

import atexit
import functools
import sys
from collections import Counter
from types import TracebackType

import jax

from alpa_lite.compat import KeyValueStore, distributed_process
from alpa_lite.runtime.device_transport import DevicePutTransport
from alpa_lite.runtime.distributed import Process, initialize
from alpa_lite.runtime.transfer_server import TransferServerTransport
from alpa_lite.runtime.transport import Transport
from alpa_lite.runtime.watchdog import Watchdog

START_TIMEOUT_S = 300.0
"""How long the first to join waits for the last: as long as `jax.distributed` does."""
END_TIMEOUT_S = 300.0
"""How long the first to end waits for the last: as long as `jax.distributed` does."""
PATIENCE_S = 3600.0
"""How long processes wait for one that plans, compiles or computes. The end of a process is noticed
by the watchdog; this is for one that lives and goes another way."""


def distributed_initialize(*, timeout_s: int = 300) -> Process:
    """Join the other processes of this program; call it before JAX is used.

    Who they are is read from the environment: that of `alpa-lite launch`, or of SLURM, MPI or
    Kubernetes, as `jax.distributed.initialize` reads them. Without any of these the program has one
    process, and nothing happens. With several, JAX's devices are started, and from here on the end
    of one process ends the others within seconds, with an error that names it.

    Args:
      timeout_s: how long to wait for the others, in seconds.

    Returns:
      This process's number, and how many there are.

    Raises:
      ValueError: the environment names some of the variables and not the others.
      RuntimeError: JAX already runs.

    Example:
      >>> import alpa_lite
      >>> alpa_lite.distributed_initialize()  # doctest: +SKIP
      Process(id=0, count=2)
    """
    process = initialize(timeout_s=timeout_s)
    process_group()
    return process


def process_group() -> ProcessGroup | None:
    """The processes of this program, None if there is one; the first call joins them.

    Raises:
      TimeoutError: one has not joined in time.
    """
    found = distributed_process()
    return None if found is None or found[1] == 1 else _joined()


@functools.cache
def _joined() -> ProcessGroup:
    group = ProcessGroup()
    group.join()
    return group


class ProcessGroup:
    """This process among the others.

    Attributes:
      me: its number; process 0 plans.
      count: how many there are.
    """

    def __init__(self, name: str = "group") -> None:
        """Nothing happens before `join`.

        Args:
          name: not used before by these processes.

        Raises:
          RuntimeError: `jax.distributed` is not initialised.
        """
        self._store = KeyValueStore()
        self.me, self.count, _ = distributed_process() or (0, 1, "")
        self._name = name
        self._watchdog = Watchdog(f"{name}/watchdog", start_timeout_s=START_TIMEOUT_S)
        self._turns: Counter[str] = Counter()
        self._transport: Transport | None = None

    def join(self) -> None:
        """Begin to watch the others, until the end of this process; start JAX's devices.

        JAX starts the devices of all processes together, so each must do it before it waits for
        another one. From then on an error that nobody catches ends the others too; a process that
        is done waits for them, since they may still read what it has sent.

        Raises:
          TimeoutError: one has not come in time.
        """
        self._watchdog.start()
        show = sys.excepthook

        def failed(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:
            show(kind, error, trace)
            self._watchdog.fail(f"{kind.__name__}: {error}")

        sys.excepthook = failed
        atexit.register(self._leave)
        jax.devices()

    def transport(self) -> Transport:
        """What takes arrays between the processes; every process asks for it."""
        if self._transport is None:
            if jax.local_devices()[0].platform == "cpu":
                self._transport = TransferServerTransport(self._name, timeout_s=PATIENCE_S)
            else:
                self._transport = DevicePutTransport()
        return self._transport

    def publish(self, topic: str, data: bytes) -> None:
        """Say something that the others `read`; nobody waits, and a topic serves once."""
        self._store.set_bytes(self._key(topic, self.me, 0), data)

    def read(self, topic: str, process: int, timeout_s: float = PATIENCE_S) -> bytes:
        """What a process has published, waited for.

        Raises:
          TimeoutError: nothing came in time.
        """
        return self._get(topic, process, 0, timeout_s)

    def turns(self, topic: str) -> int:
        """How often there was an `exchange` of a topic."""
        return self._turns[topic]

    def exchange(self, topic: str, data: bytes, timeout_s: float = PATIENCE_S) -> list[bytes]:
        """What every process has to say, by its number. All of them call this.

        Raises:
          TimeoutError: one has said nothing in time.
        """
        self._turns[topic] += 1
        turn = self._turns[topic]
        self._store.set_bytes(self._key(topic, self.me, turn), data)
        found = [self._get(topic, process, turn, timeout_s) for process in range(self.count)]
        if turn > 1:  # everybody is here, so nobody reads the last turn's any more
            self._store.delete(self._key(topic, self.me, turn - 1))
        return found

    def _get(self, topic: str, process: int, turn: int, timeout_s: float) -> bytes:
        try:
            return self._store.get_bytes(self._key(topic, process, turn), timeout_s)
        except TimeoutError:
            raise TimeoutError(
                f"process {process} has not come to {topic!r} within {timeout_s:g} s; all "
                "processes must plan, compile, call and fetch the same in the same order"
            ) from None

    def _key(self, topic: str, process: int, turn: int) -> str:
        return f"alpa_lite/{self._name}/{topic}/{turn}/{process}"

    def _leave(self) -> None:
        """Wait for the others at the end of this process, and stop watching."""
        if distributed_process() is None:  # `jax.distributed.shutdown` has waited for them
            self._watchdog.close()
            return
        try:
            self._store.barrier(f"alpa_lite/{self._name}/end", END_TIMEOUT_S)
        except jax.errors.JaxRuntimeError:
            self._watchdog.fail(f"ended {END_TIMEOUT_S:g} s before the others")
        self._transport = None
        self._watchdog.close()
