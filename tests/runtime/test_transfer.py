"""Transfers between submeshes of one process, against numpy."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alpa_lite import compat
from alpa_lite.runtime.route import Route, all_routes, find_route
from alpa_lite.runtime.transfer import Transfer, compile_route, plan_transfer
from tests.runtime.random_shardings import MESH_SHAPES, array_shapes, shardings_of

DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint32", "bool", "complex64")
MIB = 2**20


def mesh(devices, *shape: int, names: str = "xyz") -> Mesh:
    return Mesh(np.array(devices).reshape(shape), tuple(names[: len(shape)]))


def on(first: int, shape: tuple[int, ...], *spec, names: str = "xyz") -> NamedSharding:
    """A layout over the devices from `first` on."""
    devices = jax.devices()[first : first + int(np.prod(shape))]
    return NamedSharding(mesh(devices, *shape, names=names), P(*spec))


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def values(shape, dtype) -> np.ndarray:
    """Numbers that differ from place to place."""
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    return np.asarray(jnp.asarray(numbers % 251 if dtype != "bool" else numbers % 3 == 0, dtype))


def assert_moved(transfer: Transfer, value: np.ndarray) -> None:
    x = jax.device_put(value, transfer.source)
    y = transfer.start(x)
    assert y.sharding == transfer.target
    assert y.committed
    assert y.dtype == value.dtype
    for shard in y.addressable_shards:
        np.testing.assert_array_equal(shard.data, value[shard.index])
    np.testing.assert_array_equal(x, value)  # and the source is as it was


# Values.


@st.composite
def ends(draw) -> tuple[tuple[int, ...], NamedSharding, NamedSharding]:
    """Two submeshes, apart from each other if there are devices enough."""
    shape = draw(array_shapes())
    devices = draw(st.permutations(jax.devices()))
    counts = st.sampled_from(sorted(MESH_SHAPES))
    source = draw(shardings_of(shape, devices[: draw(counts)]))
    target = draw(shardings_of(shape, devices[-draw(counts) :], "abc"))
    return shape, source, target


def check_all_routes(drawn, dtype: str) -> None:
    shape, source, target = drawn
    value = values(shape, dtype)
    routes = list(all_routes(shape, value.itemsize, source, target))
    assert routes
    for route in routes:
        assert_moved(compile_route(route, value.dtype), value)


@settings(max_examples=15)
@given(ends(), st.sampled_from(DTYPES))
def test_all_routes_between_random_shardings(drawn, dtype):
    check_all_routes(drawn, dtype)


@pytest.mark.slow
@settings(max_examples=100)
@given(ends(), st.sampled_from(DTYPES))
def test_all_routes_between_many_random_shardings(drawn, dtype):
    check_all_routes(drawn, dtype)


PAIRS = {
    "4 -> 4, equal": (on(0, (2, 2), "x", "y"), on(4, (2, 2), "x", "y")),
    "4 -> 4, other spec": (on(0, (2, 2), "x", "y"), on(4, (4,), None, "x")),
    "4 -> 4, gathered": (on(0, (4,), "x"), on(4, (2, 2))),
    "4 -> 4, from copies": (on(0, (2, 2)), on(4, (2, 2), ("x", "y"))),
    "4 -> 2": (on(0, (4,), "x"), on(4, (2,), "x")),
    "2 -> 4": (on(0, (2,), "x"), on(4, (4,), None, "x")),
    "4 -> 3": (on(0, (4,), "x"), on(4, (3,), "x")),
    "3 -> 4": (on(0, (3,), None, "x"), on(4, (4,), "x")),
    "8 -> 1": (on(0, (2, 4), "x", "y"), on(3, (1,))),
    "1 -> 8": (on(3, (1,)), on(0, (2, 4), "x", "y")),
    "same devices": (on(0, (4,), "x"), on(0, (2, 2), None, "y")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_chosen_route(name):
    source, target = PAIRS[name]
    for cross_host in (False, True):
        assert_moved(
            plan_transfer(floats(24, 12), source, target, cross_host=cross_host),
            values((24, 12), "float32"),
        )


def test_a_transfer_serves_again():
    transfer = plan_transfer(floats(8, 4), *PAIRS["2 -> 4"])
    for factor in (1, 2, 3):
        assert_moved(transfer, factor * values((8, 4), "float32"))


def test_scalars_and_empty_arrays():
    for shape in ((), (0, 4)):
        assert_moved(
            plan_transfer(floats(*shape), on(0, (2, 2)), on(4, (4,))), np.zeros(shape, "f")
        )


WITHOUT_PROGRAM = {
    "whole": (on(0, (4,), "x"), on(4, (4,), "x")),
    "tile by tile": (on(0, (2, 2), "x"), on(4, (2,), "x")),
}


@pytest.mark.parametrize("name", WITHOUT_PROGRAM)
def test_source_may_be_deleted_at_once(name):
    transfer = plan_transfer(floats(64, 64), *WITHOUT_PROGRAM[name])
    assert transfer.prepare is None
    for i in range(50):
        x = jax.device_put(np.full((64, 64), i, np.float32), transfer.source)
        y = transfer.start(x)
        x.delete()
        np.testing.assert_array_equal(y, np.full((64, 64), i, np.float32))


@pytest.mark.parametrize("name", WITHOUT_PROGRAM)
def test_source_may_be_donated_at_once(name):
    transfer = plan_transfer(floats(64, 64), *WITHOUT_PROGRAM[name])
    clear = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    for i in range(50):
        x = jax.device_put(np.full((64, 64), i, np.float32), transfer.source)
        y = transfer.start(x)
        clear(x).block_until_ready()
        assert x.is_deleted()
        np.testing.assert_array_equal(y, np.full((64, 64), i, np.float32))


# Routes.


def route(size, source, target, cross_host=False) -> Route:
    return find_route(size, 4, source, target, cross_host=cross_host)


BIG = (4096, 4096)  # 64 MiB of f32


def test_equal_tiles_are_one_copy():
    found = route(BIG, on(0, (2, 2), "x", "y"), on(4, (2, 2), "a", "b", names="ab"))
    assert found.whole and found.copies
    assert not found.prepares and not found.finishes
    assert found.wire_bytes == 64 * MIB


def test_copies_are_made_on_the_target():
    """All of the value goes once over the wire, not once per device."""
    found = route(BIG, on(0, (4,), "x"), on(4, (4,)))
    assert found.finishes and not found.prepares
    assert found.wire_bytes == 64 * MIB


def test_copies_are_sent_once():
    found = route(BIG, on(0, (4,)), on(4, (4,), "x"))
    assert found.prepares and not found.finishes
    assert found.wire_bytes == 64 * MIB


@pytest.mark.parametrize(("cross_host", "times", "programs"), [(False, 4, 0), (True, 1, 2)])
def test_copies_to_copies(cross_host, times, programs):
    """Within a host more programs would take longer than more bytes; between hosts it is worth it."""
    found = route(BIG, on(0, (4,)), on(4, (4,)), cross_host)
    assert found.wire_bytes == times * 64 * MIB
    assert found.prepares + found.finishes == programs


def test_small_copies_are_not_worth_a_program():
    found = route((4, 8), on(0, (4,)), on(4, (4,)), cross_host=True)
    assert found.wire_bytes == 4 * 128
    assert not found.prepares and not found.finishes


def test_fewer_devices_send_every_byte_once():
    found = route(BIG, on(0, (2,), "x"), on(4, (2, 2), "x", "y"))
    assert found.num_parts == 2
    assert found.wire_bytes == 64 * MIB
    assert not found.finishes
    found = route(BIG, on(0, (1,)), on(1, (4,)), cross_host=True)
    assert found.num_parts == 4
    assert found.wire_bytes == 64 * MIB
    assert found.finishes


def test_more_devices_send_every_byte_once():
    found = route(BIG, on(0, (4,), "x"), on(4, (2,), "x"))
    assert found.wire_bytes == 64 * MIB
    assert found.prepares and not found.finishes
    assert route(BIG, on(0, (4,)), on(4, (2,)), cross_host=True).wire_bytes == 64 * MIB


def test_tiles_that_are_there_need_no_program():
    found = route(BIG, on(0, (2, 2), "x"), on(4, (2,), "x"))
    assert not found.prepares and not found.finishes
    assert found.wire_bytes == 64 * MIB


def test_counts_without_common_divisor_send_copies():
    assert route(BIG, on(0, (4,), "x"), on(4, (3,))).wire_bytes == 3 * 64 * MIB


def test_dims_that_cannot_be_cut_further_send_copies():
    assert route((5, 7), on(0, (4,)), on(4, (4,)), cross_host=True).wire_bytes == 4 * 35 * 4


def test_same_devices_use_no_wire():
    source, target = PAIRS["same devices"]
    found = route(BIG, source, target)
    assert found.wire_bytes == 0
    assert found.prepares and not found.copies and not found.finishes
    renamed = route(BIG, on(0, (4,), "x"), on(0, (4,), "a", names="a"))
    assert renamed.wire_bytes == 0
    assert not renamed.prepares and not renamed.finishes


def test_tiles_stay_on_devices_of_both_submeshes():
    found = route(BIG, on(0, (4,), "x"), on(2, (4,), "x"))
    assert found.wire_bytes == 64 * MIB  # tiles 0 and 1 of devices 2 and 3 are others
    found = route(BIG, on(0, (4,)), on(2, (4,)))
    assert found.wire_bytes == 2 * 64 * MIB


def test_copies_are_taken_from_all_that_have_them():
    found = route((8, 8), on(0, (2,)), on(2, (4,)))
    assert sorted(p.source for p in found.pairs) == [0, 0, 1, 1]


def test_describe():
    transfer = plan_transfer(floats(1024, 512), on(0, (2,), "x"), on(4, (2, 2), "x", "y"))
    assert transfer.describe().splitlines() == [
        "float32[1024,512]: ('x',) on 2 device(s) -> ('x', 'y') on 4 device(s)",
        "prepare on the source: into 2x2 tiles, as 2 arrays",
        "copy 4 tiles of float32[512,256], 2097152 bytes",
    ]
    gathered = plan_transfer(floats(8), on(0, (4,), "x"), on(4, (4,)))
    assert gathered.describe().splitlines()[1:] == [
        "copy 4 tiles of float32[2], 32 bytes",
        "finish on the target: from 4 tiles",
    ]
    own = on(0, (2,), "x")
    assert "nothing to do" in plan_transfer(floats(4), own, own).describe()


# Without waiting, and not through the host.


def assert_starts_at_once(route: Route) -> None:
    """`start` returns while the program that makes the value still runs."""
    transfer = compile_route(route, np.float32)
    source = route.source
    run = jax.jit(
        lambda x: jax.lax.fori_loop(0, 40, lambda i, y: jnp.tanh(y @ y.T @ y) * 0.5, x),
        in_shardings=source, out_shardings=source,
    )  # fmt: skip
    x = jax.device_put(np.full(SLOW, 0.01, np.float32), source)
    transfer.start(run(x)).block_until_ready()
    for _ in range(5):  # on a busy machine the producer may be done before we come to look
        begin_s = time.perf_counter()
        y = run(x)
        z = transfer.start(y)
        produced = y.is_ready()
        start_s = time.perf_counter() - begin_s
        np.testing.assert_array_equal(z, y)
        total_s = time.perf_counter() - begin_s
        if not produced and start_s < total_s / 3:
            return
    pytest.fail(f"start took {start_s:.3f} of {total_s:.3f} s, produced: {produced}")


SLOW = (240, 240)


@pytest.mark.parametrize("name", ["4 -> 4, equal", "4 -> 4, gathered", "2 -> 4"])
def test_start_does_not_wait_for_the_producer(name):
    assert_starts_at_once(find_route(SLOW, 4, *PAIRS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_start_does_not_wait_on_any_route(name):
    for found in all_routes(SLOW, 4, *PAIRS[name]):
        assert_starts_at_once(found)


@pytest.mark.parametrize("name", PAIRS)
def test_nothing_goes_through_the_host(name, monkeypatch):
    """`_value` is where JAX fetches an array."""
    source, target = PAIRS[name]
    x = jax.device_put(values((24, 12), "float32"), source)
    transfer = plan_transfer(x, source, target)
    with monkeypatch.context() as patch:
        patch.setattr(type(x), "_value", property(lambda self: pytest.fail("fetched")))
        result = transfer.start(x)
    np.testing.assert_array_equal(result, x)


def test_fetching_would_be_noticed(monkeypatch):
    """A plain `device_put` to other tiles does it."""
    source, target = PAIRS["4 -> 4, other spec"]
    x = jax.device_put(values((24, 12), "float32"), source)
    with monkeypatch.context() as patch:
        patch.setattr(type(x), "_value", property(lambda self: pytest.fail("fetched")))
        with pytest.raises(pytest.fail.Exception, match="fetched"):
            jax.device_put(x, target)


def test_plain_device_put_does_as_well(monkeypatch):
    """Where the private call of `compat` is not to be had."""
    monkeypatch.setattr(compat, "_can_copy_directly", lambda: False)
    for name in ("4 -> 4, equal", "2 -> 4"):
        assert_moved(plan_transfer(floats(24, 12), *PAIRS[name]), values((24, 12), "float32"))


def test_private_copy_is_used():
    assert compat._can_copy_directly()


# What is refused.


@pytest.fixture(scope="module")
def direct() -> Transfer:
    return plan_transfer(floats(8, 4), *PAIRS["4 -> 4, equal"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: np.zeros((8, 4), np.float32), TypeError, "takes a jax.Array, found ndarray"),
        (lambda: jnp.zeros((8, 4)), ValueError, "found a value in SingleDeviceSharding"),
        (
            lambda: jax.device_put(jnp.zeros((4, 4)), PAIRS["4 -> 4, equal"][0]),
            ValueError,
            r"is for float32\[8,4\], found float32\[4,4\]",
        ),
        (
            lambda: jax.device_put(jnp.zeros((8, 4), jnp.int32), PAIRS["4 -> 4, equal"][0]),
            ValueError,
            r"found int32\[8,4\]",
        ),
    ],
)
def test_values_that_are_refused(direct, make, error, message):
    with pytest.raises(error, match=message):
        direct.start(make())


def test_deleted_values_are_refused(direct):
    x = jax.device_put(jnp.zeros((8, 4)), direct.source)
    x.delete()
    with pytest.raises(ValueError, match="deleted or donated"):
        direct.start(x)


def test_layouts_may_be_written_otherwise(direct):
    """Equal tiles on equal devices are the same layout, whatever the spec."""
    source = NamedSharding(mesh(jax.devices()[:4], 2, 2, names="ab"), P("a", "b"))
    x = jax.device_put(values((8, 4), "float32"), source)
    np.testing.assert_array_equal(direct.start(x), x)


def test_keys_are_sent_as_numbers():
    source, target = PAIRS["4 -> 4, equal"]
    keys = jax.random.split(jax.random.key(0), 8)
    with pytest.raises(TypeError, match=r"jax.random.key_data"):
        plan_transfer(keys, source, target)
    data = jax.random.key_data(keys)
    sent = plan_transfer(data, on(0, (4,), "x"), on(4, (4,), "x")).start(
        jax.device_put(data, on(0, (4,), "x"))
    )
    again = jax.random.wrap_key_data(np.asarray(sent))
    assert (again == keys).all()
