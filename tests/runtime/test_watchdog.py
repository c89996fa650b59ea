"""Processes notice the end of others: the protocol between threads, and real processes that die."""

import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from alpa_lite.runtime import watchdog
from alpa_lite.runtime.watchdog import LOST_CODE, Watchdog
from tests.runtime.run_processes import run


class Store:
    """A key-value store within this process."""

    values: dict[str, str]

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str, timeout_s: float) -> str:
        end_s = time.monotonic() + timeout_s
        while key not in self.values:
            if time.monotonic() > end_s:
                raise TimeoutError(key)
            time.sleep(0.01)
        return self.values[key]


@pytest.fixture
def store(monkeypatch) -> Iterator[Store]:
    monkeypatch.setattr(Store, "values", {}, raising=False)
    monkeypatch.setattr(watchdog, "KeyValueStore", Store)
    monkeypatch.setattr(watchdog, "own_address", lambda: "127.0.0.1")
    monkeypatch.setattr(watchdog, "_LINGER_S", 0.05)
    monkeypatch.setattr(Kennel, "all_dogs", [], raising=False)
    yield Store()
    for dog in Kennel.all_dogs:
        dog.close()


class Kennel:
    """The watchdogs of some processes, all in this one, and what they have reported."""

    all_dogs: list[Watchdog]

    def __init__(self, count: int, monkeypatch, **options) -> None:
        self.reports: dict[int, str] = {}
        self.dogs = []
        for i in range(count):
            monkeypatch.setattr(watchdog, "distributed_process", lambda i=i: (i, count, ""))
            report = lambda text, i=i: self.reports.update({i: text})  # noqa: E731
            self.dogs.append(Watchdog(on_lost=report, **options))
        self.all_dogs.extend(self.dogs)

    def start(self, *which: int) -> list[BaseException]:
        errors = []

        def begin(dog: Watchdog) -> None:
            try:
                dog.start()
            except TimeoutError as error:
                errors.append(error)

        chosen = [self.dogs[i] for i in which] or self.dogs
        threads = [threading.Thread(target=begin, args=(dog,)) for dog in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors

    def wait(self, number: int) -> dict[int, str]:
        """The reports, of which there should be so many."""
        end_s = time.monotonic() + 5
        while len(self.reports) < number and time.monotonic() < end_s:
            time.sleep(0.01)
        time.sleep(0.1)
        return self.reports


def die(dog: Watchdog) -> None:
    """As the system closes the connections of a process that is killed."""
    dog._over.set()
    for peer in dog._peers:
        peer.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_every_other_process_learns_of_a_loss(store, monkeypatch, victim):
    kennel = Kennel(3, monkeypatch)
    assert not kennel.start()
    die(kennel.dogs[victim])
    text = f"process {victim} (host {socket.gethostname()}) was lost"
    assert kennel.wait(2) == dict.fromkeys({0, 1, 2} - {victim}, text)


@pytest.mark.parametrize("victim", [0, 1])
def test_every_other_process_learns_of_a_failure(store, monkeypatch, victim):
    kennel = Kennel(3, monkeypatch)
    kennel.start()
    ends = []
    monkeypatch.setattr(watchdog, "_exit", ends.append)
    monkeypatch.setattr("sys.excepthook", lambda *error: ends.append(error[0]))
    error = ValueError("two\nlines")
    kennel.dogs[victim].__exit__(ValueError, error, None)
    assert ends == [ValueError, 1]
    text = f"process {victim} (host {socket.gethostname()}) failed: ValueError: two lines"
    assert kennel.wait(2) == dict.fromkeys({0, 1, 2} - {victim}, text)


def test_an_error_after_a_loss_is_not_blamed_on_its_process(store, monkeypatch):
    kennel = Kennel(3, monkeypatch)
    kennel.start()
    ends = []
    monkeypatch.setattr(watchdog, "_exit", ends.append)
    monkeypatch.setattr("sys.excepthook", lambda *error: ends.append(error[0]))
    die(kennel.dogs[1])
    error = RuntimeError("connection closed")
    kennel.dogs[2].__exit__(RuntimeError, error, None)
    assert ends == [RuntimeError, LOST_CODE]
    assert all("process 1" in text for text in kennel.wait(2).values())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_closing_is_no_loss(store, monkeypatch, order):
    kennel = Kennel(3, monkeypatch)
    kennel.start()
    for i in order:
        kennel.dogs[i].close()
        time.sleep(0.05)
    assert not kennel.wait(0)


@pytest.mark.parametrize("code", [0, None])
def test_a_successful_exit_is_no_failure(store, monkeypatch, code):
    kennel = Kennel(2, monkeypatch)
    kennel.start()
    for dog in kennel.dogs:
        dog.__exit__(SystemExit, SystemExit(code), None)
    assert not kennel.wait(0)


@pytest.mark.parametrize(("code", "expected"), [(3, 3), ("text", 1)])
def test_exit_codes_are_kept(store, monkeypatch, code, expected):
    kennel = Kennel(2, monkeypatch)
    kennel.start()
    ends = []
    monkeypatch.setattr(watchdog, "_exit", ends.append)
    monkeypatch.setattr("sys.excepthook", lambda *error: None)
    kennel.dogs[1].__exit__(SystemExit, SystemExit(code), None)
    assert ends == [expected]


def test_one_that_does_not_come(store, monkeypatch):
    kennel = Kennel(3, monkeypatch, start_timeout_s=0.3)
    errors = sorted(map(str, kennel.start(0, 1)))
    assert errors == [
        "after 0.3 s only processes [0, 1] of 3 are watched",
        "process 0 watches, but not all of the others do",
    ]


def test_strangers_are_not_let_in(store, monkeypatch):
    kennel = Kennel(2, monkeypatch, start_timeout_s=5)

    def knock() -> None:
        host, port, _ = store.get("alpa_lite/watchdog/address", 5).split()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"0123 1 nobody\n")

    thread = threading.Thread(target=knock)
    thread.start()
    starting = threading.Thread(target=kennel.start, args=(0,))
    starting.start()
    thread.join()
    assert not kennel.start(1)
    starting.join()
    assert [peer.process for peer in kennel.dogs[0]._peers] == [1]


def test_silent_machines_are_given_up(store, monkeypatch):
    kennel = Kennel(2, monkeypatch, timeout_s=20)
    kennel.start()
    for dog in kennel.dogs:
        option = dog._peers[0].connection.getsockopt
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        probes = option(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        interval_s = option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        assert option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) + probes * interval_s == 20
        assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000


# Processes.


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim):
    """Within seconds, although they wait for its data; and they say which one it was, and where."""
    code, output = run(3, 1, "killed", str(victim), grace_s=60)
    end_s = time.time()
    died_s = float(re.search(r"dies at ([\d.]+)", output)[1])
    assert code == 128 + 9, output
    for other in {0, 1, 2} - {victim}:
        assert re.search(rf"\[{other}\] .*process {victim} \(host .+\) was lost", output), output
        assert re.search(rf"process {other} exited with {LOST_CODE}", output), output
    assert end_s - died_s < 10, output
    assert "received something" not in output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_failed_process_ends_the_others(victim):
    code, output = run(3, 1, "failed", str(victim))
    assert code == 1, output
    assert f"[{victim}] RuntimeError: no luck" in output
    for other in {0, 1, 2} - {victim}:
        text = rf"\[{other}\] .*process {victim} \(host .+\) failed: RuntimeError: no luck"
        assert re.search(text, output), output


@pytest.mark.slow
def test_a_process_may_be_done_before_the_others():
    code, output = run(3, 1, "ended")
    assert code == 0, output
    assert output.count("closed after process 0") == 3
    assert output.count("closed after process 1") == 3
