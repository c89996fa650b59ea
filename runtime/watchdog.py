"""Notices the end of other processes: `Watchdog`.

Every process holds a connection to process 0. When it breaks, the process at its other end is gone:
the system closes the connections of a process that dies, and gives up those to a machine that does
not answer. Process 0 tells the rest. A watchdog says which process on which host was lost, and ends
its own one: the main thread may be waiting for data that will never come, where no exception can
reach it.

`jax.distributed` ends the others as well, but later (when heartbeats have been missing for long
enough) and without saying where; and if process 0 is gone, at once, so that what reads heartbeats
of its own has no time to speak. A busy process is not taken for a lost one by either.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NoReturn

from alpa_lite.compat import KeyValueStore, distributed_process
from alpa_lite.runtime.distributed import own_address

LOST_CODE = 69
"""Exit code of a process that ends because of another one: `EX_UNAVAILABLE` of `sysexits.h`."""

_BYE, _LOST, _FAILED = "bye", "lost", "failed"
_LONGEST_LINE = 2000
_LINGER_S = 0.5
"""From process 0 telling the others to its end, which they would notice instead; and from an error
to taking it for this process's own."""


class Watchdog:
    """Watches the other processes, from `start` to `close` or as a context manager.

    Every process has one. An exception that leaves the context ends the program in all processes.
    """

    def __init__(
        self, name: str = "watchdog", *, timeout_s: float = 20.0, start_timeout_s: float = 60.0,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        """Nothing happens before `start`.

        Args:
          name: not used before by these processes.
          timeout_s: after how long a machine that does not answer counts as lost, in seconds.
          start_timeout_s: how long `start` waits for the others, in seconds.
          on_lost: called once, in a thread, with what has happened; `end_process` by default.

        Raises:
          RuntimeError: `jax.distributed` is not initialised.
        """
        self._store = KeyValueStore()
        self._me, self._count, _ = distributed_process() or (0, 1, "")
        self._name = name
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._on_lost = on_lost or end_process
        self._peers: list[_Peer] = []
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)
        self._over = threading.Event()

    def start(self) -> None:
        """Begin to watch; wait until all processes do.

        Raises:
          TimeoutError: one has not come in time.
        """
        key = f"alpa_lite/{self._name}/address"
        if self._me == 0:
            self._peers = self._accept(key)
        else:
            self._peers = [self._connect(key)]
        for peer in self._peers:
            peer.keep_alive(self._timeout_s)
        self._thread.start()

    def close(self) -> None:
        """End the watch; the others do not take it for a loss."""
        self._over.set()
        self._tell(_BYE)
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.connection.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if self._thread.ident is not None:
            self._thread.join()
        _close(self._peers)

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if kind is None or error is None:
            self.close()
            return
        code = error.code if isinstance(error, SystemExit) else 1
        if code is None or code == 0:
            self.close()
            return
        sys.excepthook(kind, error, trace)
        self.fail(f"{kind.__name__}: {error}", code if isinstance(code, int) else 1)

    def fail(self, text: str, code: int = 1) -> NoReturn:
        """End this process, and with it the others.

        The interpreter's own way out is no way: JAX waits there for the others, which wait too.

        Args:
          text: what they say of it.
          code: of this process.
        """
        if self._over.wait(_LINGER_S):  # another process is to blame, and the thread ends this one
            self._thread.join()
            code = LOST_CODE
        self._over.set()
        self._tell(f"{_FAILED} {text}")
        _exit(code)

    def _accept(self, key: str) -> list[_Peer]:
        """Connections from all other processes; other callers do not know the secret."""
        deadline_s = time.monotonic() + self._start_timeout_s
        secret = secrets.token_hex(8)
        host = own_address().strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        peers: list[_Peer] = []
        with socket.create_server((host, 0), family=family, backlog=self._count) as server:
            self._store.set(key, f"{host} {server.getsockname()[1]} {secret}")
            while len(peers) < self._count - 1:
                server.settimeout(max(deadline_s - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    _close(peers)
                    here = sorted(peer.process for peer in peers)
                    raise TimeoutError(
                        f"after {self._start_timeout_s:g} s only processes {[0, *here]} of "
                        f"{self._count} are watched"
                    ) from None
                with contextlib.suppress(OSError, ValueError):
                    peers.append(_greeted(connection, secret, self._start_timeout_s))
        for peer in peers:
            peer.send(_greeting(secret, 0))
        return peers

    def _connect(self, key: str) -> _Peer:
        """The connection to process 0."""
        host, port, secret = self._store.get(key, self._start_timeout_s).split()
        connection = socket.create_connection((host, int(port)), self._start_timeout_s)
        connection.sendall(_greeting(secret, self._me).encode())
        try:
            return _greeted(connection, secret, self._start_timeout_s)
        except (OSError, ValueError):
            raise TimeoutError("process 0 watches, but not all of the others do") from None

    def _watch(self) -> None:
        """Wait for what the others have to say, or for their silence."""
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while selector.get_map() and not self._over.is_set():
                for key, _ in selector.select():
                    peer = key.data
                    lines = peer.receive()
                    for line in ["lost"] if lines is None else lines:
                        if line == _BYE:
                            selector.unregister(peer.connection)
                            break
                        self._report(peer, line)

    def _report(self, peer: _Peer, line: str) -> None:
        """Tell everybody, once, that a process is lost.

        Args:
          peer: from where that is known.
          line: what it has said; nothing but the word if it is the lost one.
        """
        if self._over.is_set():
            return
        self._over.set()
        word, _, text = line.partition(" ")
        if word == _FAILED:
            text = f"process {peer.process} (host {peer.host}) failed: {text}"
        elif not text:
            text = f"process {peer.process} (host {peer.host}) was lost"
        if self._me == 0:
            self._tell(f"{_LOST} {text}")
            time.sleep(_LINGER_S)
        self._on_lost(text)

    def _tell(self, line: str) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.send(" ".join(line.split())[:_LONGEST_LINE] + "\n")


def end_process(text: str) -> None:
    """Say why on standard error, and end this process with `LOST_CODE`."""
    process = distributed_process()
    me = "" if process is None else f" {process[0]} (host {socket.gethostname()})"
    sys.stderr.write(f"alpa-lite: {text}; process{me} ends\n")
    _exit(LOST_CODE)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class _Peer:
    """The other end of a connection.

    Attributes:
      process, host: which process it is, and where.
      connection: to it.
    """

    def __init__(self, process: int, host: str, connection: socket.socket, rest: bytes) -> None:
        self.process = process
        self.host = host
        self.connection = connection
        self._rest = rest

    def send(self, text: str) -> None:
        self.connection.sendall(text.encode())

    def receive(self) -> list[str] | None:
        """The lines that have come, None if the connection has ended."""
        try:
            data = self.connection.recv(4096)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def keep_alive(self, timeout_s: float) -> None:
        """Have the system notice when the other machine does not answer for so long."""
        self.connection.settimeout(None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        probes = 4
        each_s = max(1, round(timeout_s / (probes + 1)))
        settings = {
            "TCP_KEEPIDLE": each_s, "TCP_KEEPINTVL": each_s, "TCP_KEEPCNT": probes,
            "TCP_USER_TIMEOUT": round(1000 * timeout_s),
        }  # fmt: skip
        for name, value in settings.items():
            if hasattr(socket, name):  # not all systems have all of them
                self.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _greeting(secret: str, process: int) -> str:
    return f"{secret} {process} {socket.gethostname()}\n"


def _greeted(connection: socket.socket, secret: str, timeout_s: float) -> _Peer:
    """The peer behind a connection, by its first line.

    Raises:
      OSError: nothing came in time.
      ValueError: it is none of ours.
    """
    connection.settimeout(timeout_s)
    try:
        data = b""
        while b"\n" not in data and len(data) < _LONGEST_LINE:
            more = connection.recv(_LONGEST_LINE)
            if not more:
                raise ConnectionError("the connection has ended")
            data += more
        line, _, rest = data.partition(b"\n")
        said, process, host = line.decode(errors="replace").split(" ", 2)
        if said != secret:
            raise ValueError("not a process of this program")
        return _Peer(int(process), host, connection, rest)
    except (OSError, ValueError):
        connection.close()
        raise


def _close(peers: Iterable[_Peer]) -> None:
    for peer in peers:
        peer.connection.close()
