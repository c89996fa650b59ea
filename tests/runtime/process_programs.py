"""What the processes of the multi-process tests do: `python process_programs.py program [args]`."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alpa_lite.runtime.device_transport import DevicePutTransport
from alpa_lite.runtime.distributed import initialize
from alpa_lite.runtime.route import all_routes
from alpa_lite.runtime.transfer import compile_route, plan_transfer
from alpa_lite.runtime.transfer_server import TransferServerTransport
from alpa_lite.runtime.transport import Transport
from alpa_lite.runtime.watchdog import Watchdog

CASES = 6
VALUES = 3
FLOATS = jax.ShapeDtypeStruct((8,), np.float32)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def layout(devices: list[jax.Device], shape: tuple[int, ...], seed: int) -> NamedSharding:
    """A random layout of an array with even dims over a power of two of devices."""
    rng = np.random.default_rng(seed)
    count = len(devices)
    first = int(rng.choice([n for n in (1, 2, 4, 8) if count % n == 0]))
    mesh = Mesh(np.array(devices).reshape(first, count // first), ("x", "y"))
    entries: list[list[str]] = [[] for _ in shape]
    for name in mesh.axis_names:
        place = int(rng.integers(-1, len(shape)))
        if place >= 0:
            entries[place].append(name)
    return NamedSharding(mesh, PartitionSpec(*(tuple(e) or None for e in entries)))


def make(sharding: NamedSharding, value: np.ndarray) -> jax.Array:
    """The parts that this process has of a value."""
    tiles = [
        jax.device_put(value[index], device)
        for device, index in sharding.addressable_devices_indices_map(value.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(value.shape, sharding, tiles)


def send_around(transport: Transport, num_source: int, num_target: int) -> None:
    """Random values from the first devices to the last, over all routes; compared with numpy."""
    me = jax.process_index()
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    compared = tag = 0
    for case in range(CASES):
        shape = ((16, 8), (8, 24, 8), (32,))[case % 3]
        dtype = ("float32", "bfloat16", "int32", "bool")[case % 4]
        source = layout(devices[:num_source], shape, 2 * case)
        target = layout(devices[-num_target:], shape, 2 * case + 1)
        for route in all_routes(shape, 4, source, target):
            transfer = compile_route(route, jax.numpy.dtype(dtype))
            channel = transport.open(tag, transfer)
            tag += 1
            values = [
                np.asarray(jax.numpy.asarray(np.arange(np.prod(shape)) % 97 + i, dtype)).reshape(
                    shape
                )
                for i in range(VALUES)
            ]
            for value in values:
                if any(d.process_index == me for d in devices[:num_source]):
                    channel.send(make(source, value))
                if any(d.process_index == me for d in devices[-num_target:]):
                    result = channel.receive()
                    assert result.sharding == target
                    for shard in result.addressable_shards:
                        np.testing.assert_array_equal(shard.data, value[shard.index])
                        compared += 1
    say(f"compared {compared}")


def server(num_source: str, num_target: str) -> None:
    with Watchdog():
        transport = TransferServerTransport()
        send_around(transport, int(num_source), int(num_target))
        transport.close()


def device_put(num_source: str, num_target: str) -> None:
    transport = DevicePutTransport()
    send_around(transport, int(num_source), int(num_target))
    transport.close()


def early() -> None:
    """Receives before anything is sent, in another order; nobody waits."""
    first, last = jax.devices()[0], jax.devices()[-1]
    with Watchdog():
        transport = TransferServerTransport()
        source, target = layout([first], (8,), 0), layout([last], (8,), 0)
        channels = [transport.open(i, plan_transfer(FLOATS, source, target)) for i in range(3)]
        if jax.process_index() == 0:
            time.sleep(1.0)
            for i in (0, 1, 2):
                channels[i].send(make(source, np.full((8,), i, np.float32)))
        else:
            begin_s = time.perf_counter()
            results = [channels[i].receive() for i in (2, 0, 1)]
            doubled = [jax.jit(lambda x: 2 * x)(x) for x in results]
            say(f"enqueued after {time.perf_counter() - begin_s:.3f} s")
            assert not any(x.is_ready() for x in doubled)
            np.testing.assert_array_equal([x[0] for x in doubled], [4, 0, 2])
        transport.close()


def killed(victim: str) -> None:
    """One process dies; the others wait for what it would have sent."""
    me, devices = jax.process_index(), sorted(jax.devices(), key=lambda d: d.process_index)
    with Watchdog():
        transport = TransferServerTransport()
        source, target = (layout([devices[i]], (8,), 0) for i in (int(victim), me))
        if me == int(victim):
            transport.open(me, plan_transfer(FLOATS, source, source))
            time.sleep(1.0)  # the others are waiting by now
            say(f"dies at {time.time():.3f}")
            os.kill(os.getpid(), signal.SIGKILL)
        result = transport.open(me, plan_transfer(FLOATS, source, target)).receive()
        result.block_until_ready()
        say("received something")


def failed(victim: str) -> None:
    """One process raises; the others sleep."""
    with Watchdog():
        if jax.process_index() == int(victim):
            raise RuntimeError("no luck")
        time.sleep(60)


def ended() -> None:
    """One process is done before the others: first process 0, then process 1."""
    for first in (0, 1):
        with Watchdog(f"watchdog{first}"):
            if jax.process_index() != first:
                time.sleep(1.0)
        say(f"closed after process {first}")


def alone() -> None:
    """Nothing but starting; prints the environment that makes the difference."""
    say(f"{len(jax.local_devices())} of {len(jax.devices())} {jax.default_backend()} devices")


PROGRAMS: dict[str, Callable[..., None]] = {
    "server": server,
    "device_put": device_put,
    "early": early,
    "killed": killed,
    "failed": failed,
    "ended": ended,
    "alone": alone,
}


def main() -> None:
    name, *arguments = sys.argv[1:]
    if name == "device_put":  # on the CPU through sockets; port 0 would hang the receiver
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        jax.config.update("jax_cross_host_transfer_socket_address", address)
    process = initialize(timeout_s=60)
    say(f"process {process.id} of {process.count}")
    PROGRAMS[name](*arguments)
    say("done")


if __name__ == "__main__":
    main()
