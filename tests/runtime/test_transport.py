"""Channels within a process and between processes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alpa_lite.compat import KeyValueStore
from alpa_lite.runtime.device_transport import DevicePutTransport
from alpa_lite.runtime.distributed import own_address
from alpa_lite.runtime.route import Pair, Route, find_route
from alpa_lite.runtime.transfer import plan_transfer
from alpa_lite.runtime.transfer_server import TransferServerTransport
from alpa_lite.runtime.transport import Channel, LocalTransport, Post, Transport, post_of
from alpa_lite.runtime.watchdog import Watchdog
from tests.runtime.run_processes import run


def line_of(first: int, count: int, *spec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[first : first + count]), ("x",)), P(*spec))


# Within a process.


def test_values_arrive_in_order():
    transport = LocalTransport()
    source, target = line_of(0, 4, "x"), line_of(4, 2, None, "x")
    channels = [transport.open(i, plan_transfer(jnp.zeros((8, 4)), source, target)) for i in (0, 1)]
    for i in range(3):
        for k, channel in enumerate(channels):
            channel.send(jax.device_put(np.full((8, 4), 10.0 * k + i, np.float32), source))
    for k, channel in enumerate(channels):
        for i in range(3):
            result = channel.receive()
            assert result.sharding == target
            assert (np.asarray(result) == 10 * k + i).all()
    transport.close()


def test_nothing_to_receive():
    transfer = plan_transfer(jnp.zeros(8), line_of(0, 2), line_of(2, 2))
    with pytest.raises(RuntimeError, match="nothing was sent on channel 5"):
        LocalTransport().open(5, transfer).receive()


def test_transports_are_transports():
    assert isinstance(LocalTransport(), Transport)
    assert isinstance(DevicePutTransport(), Transport)
    transfer = plan_transfer(jnp.zeros(8), line_of(0, 2), line_of(2, 2))
    for transport in (LocalTransport(), DevicePutTransport()):
        assert isinstance(transport.open(0, transfer), Channel)


class FakeDevice:
    def __init__(self, process_index: int) -> None:
        self.process_index = process_index


def test_post_of_a_process(monkeypatch):
    """Six tiles from processes 0, 1 to 1, 2: the k-th one sent is the k-th one received."""
    route = find_route((8,), 4, line_of(0, 1), line_of(1, 1))
    processes = [(0, 1), (1, 1), (0, 2), (1, 2), (1, 1), (0, 1)]
    moves = tuple((FakeDevice(a), FakeDevice(b)) for a, b in processes)
    monkeypatch.setattr(Route, "moves", property(lambda self: moves))
    assert post_of(route, 0) == Post(((1, (0, 2)), (2, (1,))), (), (), 0)
    assert post_of(route, 1) == Post(((2, (1,)),), ((0, (0, 3)),), ((0, 1), (2, 2)), 4)
    assert post_of(route, 2) == Post((), ((0, (0,)), (1, (1,))), (), 2)


def test_leaving_tiles_are_those_of_the_pairs():
    transfer = plan_transfer(jnp.zeros(8), line_of(0, 2, "x"), line_of(4, 4, "x"))
    assert transfer.route.pairs == (Pair(0, 0, 0), Pair(1, 0, 1), Pair(0, 1, 2), Pair(1, 1, 3))
    x = jax.device_put(jnp.arange(8.0), transfer.source)
    tiles = transfer.leaving_tiles(transfer.start_source(x))
    assert [t.tolist() for t in tiles] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [t.device.id for t in tiles] == [0, 0, 1, 1]


def test_without_other_processes():
    with pytest.raises(RuntimeError, match="not initialised"):
        KeyValueStore()
    with pytest.raises(RuntimeError, match="not initialised"):
        Watchdog()
    with pytest.raises(RuntimeError, match="not initialised"):
        own_address()
    with pytest.raises(RuntimeError, match="not initialised"):
        TransferServerTransport()


# Between processes.


def assert_compared(code: int, output: str) -> None:
    assert code == 0, output
    assert sum(map(int, re.findall(r"compared (\d+)", output))) >= 18, output


def test_two_processes_with_a_device_each():
    assert_compared(*run(2, 1, "server", "1", "1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "devices", "source", "target"),
    [
        (2, 2, 2, 2),
        (2, 4, 8, 4),  # the source is on both processes
        (4, 2, 4, 4),  # both submeshes are on two processes
        (3, 1, 2, 2),  # the second process has a part of both
    ],
)
def test_several_processes(num_processes, devices, source, target):
    assert_compared(*run(num_processes, devices, "server", str(source), str(target)))


@pytest.mark.slow
def test_device_put_over_sockets():
    assert_compared(*run(2, 4, "device_put", "8", "4"))


@pytest.mark.slow
def test_receiving_first_in_any_order():
    code, output = run(2, 1, "early")
    assert code == 0, output
    assert float(re.search(r"enqueued after ([\d.]+) s", output)[1]) < 0.9
