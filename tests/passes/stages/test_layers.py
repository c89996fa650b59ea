"""Which equations of the forward pass belong together, and which move with every stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import alpa_lite
from alpa_lite import compat
from alpa_lite.errors import StepError
from alpa_lite.ir.flops import is_matmul
from alpa_lite.ir.marks import layer_mark_p
from alpa_lite.models import build
from alpa_lite.passes.stages.layers import LayerGraph, build_layers, jaxpr_equation_flops
from tests.passes.stages.stage_flow import layered

WIDTH, ROWS = 16, 8

X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def params(num: int, width: int = WIDTH) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((width, width), jnp.float32)] * num


def sgd(loss: Callable[[Any, Any], jax.Array]) -> Callable[..., Any]:
    def step(state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(state, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value

    return step


def graph_of(loss: Any, state: Any, batch: Any = X, layer_num: Any = "auto") -> LayerGraph:
    return layered(sgd(loss), state, batch, layer_num=layer_num).graph


def chain(ws: Any, x: jax.Array) -> jax.Array:
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def matmuls(graph: LayerGraph) -> list[int]:
    """Matrix products of each layer."""
    return [
        sum(is_matmul(graph.parts.loop[i].primitive.name) for i in layer) for layer in graph.layers
    ]


def scopes(graph: LayerGraph, layer: int) -> list[str]:
    """Module scopes of a layer's equations."""
    return [compat.scope_name(graph.parts.loop[i].source_info) for i in graph.layers[layer]]


def check_partition(graph: LayerGraph) -> None:
    """Layers and free equations are all equations, in order, and layers read earlier ones only."""
    placed = [i for layer in graph.layers for i in layer]
    assert placed == sorted(placed)
    assert sorted((*placed, *graph.free)) == list(range(len(graph.parts.loop)))
    assert len(graph.flops) == len(graph.keys) == graph.num_layers
    home = {v: i for i in placed for v in graph.parts.loop[i].outvars}
    for i in graph.free:
        read = graph.parts.loop[i].invars
        assert not any(not compat.is_literal(a) and a in home for a in read), "not free at all"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.relu(h))


class Net(nn.Module):
    num_blocks: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_blocks):
            x = Block(name=f"block_{i}")(x)
        return x


def flax_loss(p: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(Net().apply({"params": p}, x) ** 2)


@functools.cache
def flax_params() -> Any:
    return jax.eval_shape(Net().init, jax.random.key(0), X)["params"]


def test_one_layer_per_block_of_a_flax_model() -> None:
    graph = graph_of(flax_loss, flax_params())
    check_partition(graph)
    assert matmuls(graph) == [2, 2, 2, 2]
    for i in range(4):
        assert all(f"block_{i}" in scope for scope in scopes(graph, i) if "block" in scope)


def test_blocks_of_a_flax_model_in_pairs() -> None:
    graph = graph_of(flax_loss, flax_params(), layer_num=2)
    assert matmuls(graph) == [4, 4]
    assert graph.keys[0] != graph.keys[1], "the second has the loss"


def test_repeated_runs_are_found_without_scopes() -> None:
    graph = graph_of(chain, params(6))
    check_partition(graph)
    assert matmuls(graph) == [1] * 6
    assert len(set(graph.keys[:5])) == 1, "layers that compute the same have equal keys"
    assert graph.keys[5] != graph.keys[0], "the last one has the loss"


def test_repeated_runs_of_several_equations_in_front_of_a_head() -> None:
    def loss(p: Any, x: jax.Array) -> jax.Array:
        x = jnp.sin(x @ p["embed"])
        for a, b in zip(p["a"], p["b"], strict=True):
            x = x + jnp.tanh(x @ a) @ b
        return jnp.mean((x @ p["head"]) ** 2)

    state = {
        "embed": params(1)[0],
        "a": params(4),
        "b": params(4),
        "head": jax.ShapeDtypeStruct((WIDTH, 4), jnp.float32),
    }
    graph = graph_of(loss, state, layer_num=4)
    assert matmuls(graph) == [3, 2, 2, 3]


@pytest.mark.parametrize("layer_num", [1, 2, 3, 5, 6])
def test_as_many_layers_as_asked_for(layer_num: int) -> None:
    graph = graph_of(chain, params(6), layer_num=layer_num)
    check_partition(graph)
    assert graph.num_layers == layer_num
    assert sum(matmuls(graph)) == 6 and min(matmuls(graph)) >= 1
    total = sum(jaxpr_equation_flops(graph.parts.loop[i]) for each in graph.layers for i in each)
    assert sum(graph.flops) == pytest.approx(total)


def test_layers_that_cannot_be_even_are_noted() -> None:
    (note,) = graph_of(chain, params(5), layer_num=4).notes
    assert "cannot be cut into 4 layers more evenly" in note
    assert not graph_of(chain, params(5), layer_num=5).notes


def test_more_layers_than_operations() -> None:
    with pytest.raises(StepError, match=r"loss function cannot be cut into layers: .*100"):
        graph_of(chain, params(2), layer_num=100)


# Marks.


def marked(marks: tuple[int, ...]) -> Callable[..., jax.Array]:
    def loss(ws: Any, x: jax.Array) -> jax.Array:
        for i, w in enumerate(ws):
            x = jnp.tanh(x @ w)
            if i in marks:
                x = alpa_lite.mark_layer(x)
        return jnp.mean(x**2)

    return loss


def test_marks_are_where_layers_end() -> None:
    graph = graph_of(marked((0, 3)), params(6))
    check_partition(graph)
    assert matmuls(graph) == [1, 3, 2]
    for layer in graph.layers[:2]:
        assert graph.parts.loop[layer[-1]].primitive is layer_mark_p
    assert matmuls(graph_of(marked((0, 3)), params(6), layer_num=3)) == [1, 3, 2]


def test_a_mark_at_the_end_of_the_model_cuts_the_loss_off() -> None:
    assert matmuls(graph_of(marked((0, 1, 2)), params(3))) == [1, 1, 1, 0]


def test_a_mark_on_the_loss_itself_makes_no_layer() -> None:
    def loss(ws: Any, x: jax.Array) -> jax.Array:
        return alpa_lite.mark_layer(marked((0,))(ws, x))

    assert matmuls(graph_of(loss, params(3))) == [1, 2]


def test_marks_of_a_pytree() -> None:
    def loss(ws: Any, x: jax.Array) -> jax.Array:
        state = alpa_lite.mark_layer({"y": x @ ws[0], "x": x @ ws[1]})
        return jnp.mean(state["x"] @ ws[2] + state["y"])

    assert matmuls(graph_of(loss, params(3))) == [2, 1]


def test_marks_and_another_number_of_layers() -> None:
    with pytest.raises(StepError, match="marks 3 layers with mark_layer, but layer_num is 2"):
        graph_of(marked((0, 3)), params(6), layer_num=2)


# What moves with every stage.


def free_names(graph: LayerGraph) -> list[str]:
    return [graph.parts.loop[i].primitive.name for i in sorted(graph.free)]


def test_casts_of_parameters_and_masks_are_free() -> None:
    def loss(ws: Any, x: jax.Array) -> jax.Array:
        ws = [w.astype(jnp.bfloat16) for w in ws]
        mask = jnp.tril(jnp.ones((WIDTH, WIDTH), jnp.bfloat16))
        h = x.astype(jnp.bfloat16)
        for w in ws:
            h = jnp.tanh(h @ (w * mask))
        return jnp.mean(h.astype(jnp.float32) ** 2)

    graph = graph_of(loss, params(4))
    check_partition(graph)
    free = free_names(graph)
    assert free.count("convert_element_type") >= 4 and "iota" in free
    assert matmuls(graph) == [1] * 4
    assert not any(is_matmul(name) or name == "tanh" for name in free)


def test_cheap_work_on_the_batch_alone_is_free_and_heavy_work_is_not() -> None:
    def loss(ws: Any, batch: Any) -> jax.Array:
        positions = jnp.cumsum(batch["mask"], axis=1)  # cheap, no parameter
        features = jnp.cos(batch["x"] @ jnp.ones((WIDTH, WIDTH)))  # a matrix product
        for w in ws:
            features = jnp.tanh(features @ w) * batch["mask"][:, :1]
        return jnp.mean(features * positions[:, :1])

    batch = {"x": X, "mask": jax.ShapeDtypeStruct((ROWS, 4), jnp.float32)}
    big = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * 3
    graph = graph_of(loss, big, batch)
    check_partition(graph)
    assert sum(matmuls(graph)) == 4, "the product of the batch alone is placed"
    placed = {graph.parts.loop[i].primitive.name for each in graph.layers for i in each}
    assert "cos" in placed


def test_splits_of_keys_are_free_and_what_they_draw_for_rows_is_placed_or_cheap() -> None:
    def loss(ws: Any, batch: Any) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), len(ws))
        x = batch
        for w, key in zip(ws, keys, strict=True):
            x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), jnp.tanh(x @ w), 0.0)
        return jnp.mean(x)

    graph = graph_of(loss, params(3))
    assert "random_split" in free_names(graph)
    assert matmuls(graph) == [1, 1, 1]


def test_free_equations_never_read_placed_ones() -> None:
    for name, options in (("gpt-test", {"dropout_rate": 0.1}), ("moe-test", {})):
        setup = build(name, **options)
        graph = layered(setup.step, setup.state_shapes(), setup.batch_shapes(4)).graph
        check_partition(graph)
        assert sum(graph.flops) > 0.98 * sum(map(jaxpr_equation_flops, graph.parts.loop))


@pytest.mark.parametrize("model", ["gpt-test", "llama-test"])
def test_blocks_of_language_models(model: str) -> None:
    setup = build(model, num_layers=4)
    graph = layered(setup.step, setup.state_shapes(), setup.batch_shapes(4)).graph
    check_partition(graph)
    assert graph.keys[1] == graph.keys[2], "the inner blocks are alike"
    assert graph.flops[1] == graph.flops[2]
    assert all("layer_1" in s for s in scopes(graph, 1) if "layer_" in s)


def test_flops_of_nested_equations() -> None:
    def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    def of(fun: Any) -> float:
        jaxpr = jax.make_jaxpr(fun)(np.ones((4, 8), np.float32), np.ones((8, 8), np.float32))
        return sum(map(jaxpr_equation_flops, jaxpr.jaxpr.eqns))

    once = of(lambda x, w: jnp.tanh(x @ w))
    assert once >= 2 * 4 * 8 * 8
    assert of(scanned) == pytest.approx(5 * once, rel=0.01)
    cond = of(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x))
    assert 2 * 4 * 8 * 8 <= cond < 1.5 * once, "the dearer branch"


def test_build_layers_does_not_depend_on_variable_names() -> None:
    """Two traces of one step have the same layers and keys."""
    first, second = (graph_of(chain, params(4)) for _ in range(2))
    assert first.layers == second.layers and first.keys == second.keys
    again = build_layers(first.parts)
    assert again.layers == first.layers


def test_layers_of_microbatches_of_any_size() -> None:
    """Bytes that cross a cut are added up; petabytes of them are no error."""
    large = jax.ShapeDtypeStruct((1 << 40, WIDTH), jnp.float32)
    assert graph_of(chain, params(8), large, 4).layers == graph_of(chain, params(8), X, 4).layers
