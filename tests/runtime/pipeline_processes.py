"""What the processes of the pipeline tests do: `python pipeline_processes.py program [arguments]`.

The steps are here too, so that the tests run the same ones in one process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import alpa_lite
from alpa_lite.runtime.arrays import absent, is_local, own_copy, put

ROWS, WIDTH = 16, 16
STEPS = 3
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))

Tree = Any
Step = Callable[[Tree, Tree], tuple[Tree, Tree]]


def init(layers: int) -> Tree:
    keys = jax.random.split(jax.random.key(1), layers + 1)
    params = {
        f"w{i}": jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for i, k in enumerate(keys)
    }
    return {
        "params": params, "opt": TX.init(params), "count": jnp.int32(0), "key": jax.random.key(2),
    }  # fmt: skip


def step(state: Tree, batch: Tree, *, rate: float) -> tuple[Tree, Tree]:
    """Tied first and last matrix, clipping over all stages, dropout if the rate is not 0."""
    key = jax.random.fold_in(state["key"], state["count"])

    def loss(params: Tree) -> tuple[jax.Array, Tree]:
        x = batch["x"] @ params["w0"]
        for i in range(1, len(params)):
            x = jnp.tanh(x @ params[f"w{i}"]) + x
            if rate:
                keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, x.shape)
                x = jnp.where(keep, x / (1 - rate), 0)
        error = jnp.mean((x @ params["w0"].T - batch["y"]) ** 2, axis=1)
        return jnp.mean(error), error

    (value, error), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
    updates, opt = TX.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    new = {**state, "params": params, "opt": opt, "count": state["count"] + 1}
    squares = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
    return new, {"loss": value, "rows": error, "norm": jnp.sqrt(squares)}


def batch(seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(ROWS, WIDTH)).astype(np.float32) for name in "xy"}


def net(layers: int, rate: float) -> tuple[Step, Callable[[], Tree], Callable[[int], Tree]]:
    return functools.partial(step, rate=rate), functools.partial(init, layers), batch


def scan() -> tuple[Step, Callable[[], Tree], Callable[[int], Tree]]:
    """Stacked layers."""

    def scanned(weights: Tree, rows: Tree) -> tuple[Tree, jax.Array]:
        def loss(weights: Tree) -> jax.Array:
            def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
                return jnp.tanh(x @ w) + x, None

            x, _ = jax.lax.scan(layer, rows["x"] @ weights["first"], weights["layers"])
            return jnp.mean((x - rows["y"]) ** 2)

        value, grads = jax.value_and_grad(loss)(weights)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads), value

    weights = jax.random.normal(jax.random.key(1), (5, WIDTH, WIDTH)) / WIDTH**0.5
    return scanned, lambda: {"first": weights[0], "layers": weights[1:]}, batch


def gpt() -> tuple[Step, Callable[[], Tree], Callable[[int], Tree]]:
    from alpa_lite.models import build

    setup = build("gpt-test", optimizer="sgd", learning_rate=0.1, hidden_size=32)
    return (
        setup.step,
        lambda: setup.init(jax.random.key(0)),
        lambda seed: setup.make_batch(seed, ROWS),
    )


def grid(dp: int, tp: int, pp: int, **options: Any) -> alpa_lite.ThreeDParallel:
    return alpa_lite.ThreeDParallel(dp, tp, pp, num_microbatches=4, **options)


def by_hand(*submeshes: int, **options: Any) -> alpa_lite.ManualPipeline:
    """A layer per stage."""
    return alpa_lite.ManualPipeline(
        layers=[[i] for i in range(len(submeshes))], submeshes=[(1, n) for n in submeshes],
        num_microbatches=4, layer_num=len(submeshes), **options,
    )  # fmt: skip


CASES: dict[str, tuple[Any, Any]] = {
    "plain": (functools.partial(net, 2, 0.0), grid(1, 1, 2)),
    "1f1b": (functools.partial(net, 4, 0.2), grid(2, 2, 2)),
    "zb-h1": (functools.partial(net, 4, 0.2), grid(2, 1, 4, schedule="zb-h1")),
    "interleaved": (
        functools.partial(net, 4, 0.0),
        grid(2, 2, 2, schedule="interleaved_1f1b", num_virtual=2),
    ),
    "chimera": (functools.partial(net, 4, 0.0), grid(2, 2, 2, schedule="chimera")),
    "uneven": (functools.partial(net, 3, 0.0), by_hand(2, 4, 2)),
    "gpt": (gpt, grid(2, 2, 2)),
    "scan": (scan, grid(2, 2, 2)),
    "one stage": (functools.partial(net, 2, 0.2), alpa_lite.Zero3Parallel(num_microbatches=2)),
}
"""Name -> (what makes step, state and batches; the method)."""


def run_case(name: str) -> dict[str, np.ndarray]:
    """Everything that some steps return, by path; in several processes the same in all of them."""
    make, method = CASES[name]
    function, new_state, new_batch = make()
    parallel = alpa_lite.parallelize(function, method=method)
    state = parallel.init(new_state, new_batch(0))
    found = {}
    for seed in range(STEPS):
        if seed == STEPS - 1:  # as if read from a file
            state = alpa_lite.fetch(state)
        state, aux = parallel(state, new_batch(seed))
        found |= _values(f"step {seed}", aux)
    return found | _values("state", state)


def _values(name: str, tree: Tree) -> dict[str, np.ndarray]:
    values = jax.tree_util.tree_leaves_with_path(alpa_lite.fetch(tree))
    return {
        f"{name} {jax.tree_util.keystr(path)}": np.asarray(
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )
        for path, x in values
    }


# Programs.


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def case(name: str, folder: str) -> None:
    found = run_case(name)
    np.savez(Path(folder) / f"{jax.process_index()}.npz", **found)


def killed(victim: str) -> None:
    """A process dies after its first step; the others go on."""
    make, method = CASES["plain"]
    function, new_state, new_batch = make()
    parallel = alpa_lite.parallelize(function, method=method)
    state = parallel.init(new_state, new_batch(0))
    for seed in range(1000):
        state, aux = parallel(state, new_batch(seed))
        if jax.process_index() == int(victim):
            say(f"dies at {time.time():.3f}")
            os.kill(os.getpid(), signal.SIGKILL)
        say(f"loss {alpa_lite.fetch(aux['loss']):.3f}")


def failed(victim: str) -> None:
    """A process raises an error after its first step; the others go on."""
    make, method = CASES["plain"]
    function, new_state, new_batch = make()
    parallel = alpa_lite.parallelize(function, method=method)
    state = parallel.init(new_state, new_batch(0))
    for seed in range(1000):
        state, aux = parallel(state, new_batch(seed))
        if jax.process_index() == int(victim):
            raise RuntimeError("no luck")
        alpa_lite.fetch(aux)


def disagree(folder: str) -> None:
    """Everything in which processes may differ at the start, one after the other."""
    me = jax.process_index()
    function, new_state, new_batch = CASES["plain"][0]()
    state, rows = jax.eval_shape(new_state), new_batch(0)

    def attempt(**options: Any) -> None:
        with refused():
            alpa_lite.parallelize(function, **options).plan(state, rows)

    attempt(plan=alpa_lite.load_plan(Path(folder) / f"{me}.json"))
    attempt(method=grid(3, 1, 2))  # not that many devices: found by process 0
    attempt(plan=alpa_lite.load_plan(Path(folder) / "1.json") if me else None, method=grid(1, 1, 2))
    other = functools.partial(function, rate=0.5)
    with refused():
        alpa_lite.parallelize(other if me else function, method=grid(1, 1, 2)).plan(state, rows)
    # And now as it should be.
    plan = alpa_lite.parallelize(function, method=grid(1, 1, 2)).plan(state, rows)
    say(f"agreed on {plan.schedule}")


@contextlib.contextmanager
def refused() -> Iterator[None]:
    try:
        yield
    except alpa_lite.AlpaLiteError as error:
        say(f"{type(error).__name__}: {error}")
    else:
        say("nothing was wrong")


def arrays() -> None:
    """Arrays of this process, of the other one, and of both, of two devices each."""
    me, devices = jax.process_index(), jax.devices()
    meshes = [devices[:2], devices[2:], devices[1:3], devices]
    value = np.arange(24, dtype=np.float32).reshape(4, 6)
    keys = jax.random.split(jax.random.key(3), 4)
    tree = {}
    for i, chosen in enumerate(meshes):
        mesh = Mesh(np.array(chosen), ("x",))
        for spec in (P(), P("x"), P(None, "x")):
            if spec == P(None, "x") and len(chosen) == 4:
                continue
            layout = NamedSharding(mesh, spec)
            x = put(value + i, layout)
            own = [d for d in chosen if d.process_index == me]
            assert is_local(layout) == bool(own) == bool(x.addressable_shards)
            assert (x.shape, x.dtype, x.sharding) == (value.shape, value.dtype, layout)
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, (value + i)[shard.index])
            copy = own_copy(x)
            for a, b in zip(x.addressable_shards, copy.addressable_shards, strict=True):
                np.testing.assert_array_equal(a.data, b.data)
                assert a.data.unsafe_buffer_pointer() != b.data.unsafe_buffer_pointer()
            again = put(x, NamedSharding(mesh, P()))
            tree[f"{i} {spec}"] = [x, copy, again]
        tree[f"{i} keys"] = put(keys, NamedSharding(mesh, P("x")))
        tree[f"{i} key"] = own_copy(put(keys[0], NamedSharding(mesh, P())))
        weak = (
            absent(jax.typeof(2.0), NamedSharding(Mesh(devices[2:], ("x",)), P())) if not me else 0
        )
        assert me or (weak.weak_type and weak.shape == ())
    tree["here"], tree["number"] = jnp.float32(me), 7
    found = alpa_lite.fetch(tree)
    for name, x in found.items():
        if isinstance(x, list):
            for each in x:
                np.testing.assert_array_equal(each, value + int(name[0]))
        elif "key" in name:
            wanted = keys if "keys" in name else keys[0]
            np.testing.assert_array_equal(jax.random.key_data(x), jax.random.key_data(wanted))
    assert (found["here"], found["number"]) == (me, 7)
    there = NamedSharding(Mesh(devices[2 - 2 * me : 4 - 2 * me], ("x",)), P())
    here = NamedSharding(Mesh(devices[2 * me : 2 * me + 2], ("x",)), P())
    try:
        put(put(value, there), here)
    except ValueError as error:
        say(str(error))


PROGRAMS: dict[str, Callable[..., None]] = {
    "case": case,
    "killed": killed,
    "failed": failed,
    "disagree": disagree,
    "arrays": arrays,
}


def main() -> None:
    name, *arguments = sys.argv[1:]
    process = alpa_lite.distributed_initialize(timeout_s=60)
    say(f"process {process.id} of {process.count}")
    PROGRAMS[name](*arguments)
    say("done")


if __name__ == "__main__":
    main()
