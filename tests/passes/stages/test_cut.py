"""The forward pass in stages: what each runs and reads, and what goes between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import alpa_lite
from alpa_lite.errors import StepError
from alpa_lite.passes.stages.cut import StageCut, cut_forward, replicate
from alpa_lite.passes.stages.layers import LayerGraph
from alpa_lite.passes.stages.parts import variables
from tests.passes.stages.stage_flow import check, layered, staged

WIDTH, ROWS = 8, 4
X = jnp.linspace(-1.0, 1.0, ROWS * WIDTH).reshape(ROWS, WIDTH)


def params(num: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), num)
    return [0.5 * jax.random.normal(k, (WIDTH, WIDTH)) for k in keys]


def sgd(loss: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    def step(state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss, has_aux=has_aux)(state, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value

    return step


def marks(x: Any) -> Any:
    return alpa_lite.mark_layer(x)


def graph_of(step: Any, state: Any, batch: Any = X) -> LayerGraph:
    return layered(step, state, batch).graph


def links(cuts: Sequence[StageCut]) -> list[tuple[int, int, bool]]:
    """(source, target, differentiable) of every link, which both of its ends know."""
    sent = [link for cut in cuts for link in cut.sent]
    received = [link for cut in cuts for link in cut.received]
    assert {*sent} == {*received} and len(sent) == len(received)
    for cut in cuts:
        assert all(link.source == cut.index for link in cut.sent)
        assert all(link.target == cut.index for link in cut.received)
    return sorted((link.source, link.target, link.differentiable) for link in sent)


def chain(ws: Any, x: jax.Array) -> jax.Array:
    for w in ws:
        x = marks(jnp.tanh(x @ w))
    return jnp.mean(x**2)


def test_a_chain() -> None:
    cuts = cut_forward(graph_of(sgd(chain), params(3)), [[0], [1], [2, 3]])
    assert links(cuts) == [(0, 1, True), (1, 2, True)]
    assert [len(cut.wrt) for cut in cuts] == [1, 1, 1]
    assert [len(cut.batch) for cut in cuts] == [1, 0, 0]
    assert [cut.results for cut in cuts] == [(), (), (0,)], "the loss is of the last stage"
    assert [cut.layers for cut in cuts] == [(0,), (1,), (2, 3)]
    assert [len(cut.segments) for cut in cuts] == [2, 2, 3], "the free equations, then the layers"


def test_a_skip_connection_goes_straight_to_its_reader() -> None:
    def loss(ws: Any, x: jax.Array) -> jax.Array:
        first = marks(jnp.tanh(x @ ws[0]))
        second = marks(jnp.tanh(first @ ws[1]))
        third = marks(jnp.tanh(second @ ws[2]))
        return jnp.mean((third @ ws[3] + first) ** 2)

    cuts = cut_forward(graph_of(sgd(loss), params(4)), [[0], [1], [2], [3]])
    assert links(cuts) == [(0, 1, True), (0, 3, True), (1, 2, True), (2, 3, True)]
    first = {link.variable for link in cuts[0].sent}
    assert len(first) == 1, "one value with two readers"
    check(staged(sgd(loss), params(4), X, stages=4))
    check(staged(sgd(loss), params(4), X, stages=[[0, 1], [2, 3]]))


def test_an_encoder_read_by_all_decoder_layers() -> None:
    def loss(ws: Any, x: jax.Array) -> jax.Array:
        memory = marks(jnp.tanh(x @ ws[0]))
        y = x
        for w in ws[1:]:
            y = marks(jnp.tanh(y @ w) * memory)
        return jnp.mean(y**2)

    cuts = cut_forward(graph_of(sgd(loss), params(4)), [[0], [1], [2], [3, 4]])
    memory = [(0, target, True) for target in (1, 2, 3)]
    assert links(cuts) == sorted([*memory, (1, 2, True), (2, 3, True)])
    assert [len(cut.batch) for cut in cuts] == [1, 1, 0, 0], "the batch goes where it is read"
    check(staged(sgd(loss), params(4), X, stages=[[0], [1], [2], [3, 4]]))


def test_tied_parameters_are_of_every_stage_that_reads_them() -> None:
    def loss(ws: Any, x: jax.Array) -> jax.Array:
        for i in (0, 1, 2):
            x = marks(jnp.tanh(x @ ws[i]))
        return jnp.mean((x @ ws[0].T) ** 2)

    graph = graph_of(sgd(loss), params(3))
    cuts = cut_forward(graph, [[0], [1], [2, 3]])
    tied = graph.parts.inputs[0]
    assert [tied in cut.wrt for cut in cuts] == [True, False, True]
    assert [len(cut.wrt) for cut in cuts] == [1, 1, 2]
    assert links(cuts) == [(0, 1, True), (1, 2, True)], "a parameter is no activation"
    check(staged(sgd(loss), params(3), X, stages=[[0], [1], [2, 3]]))


def test_masks_casts_and_keys_are_repeated_and_not_sent() -> None:
    def loss(ws: Any, x: jax.Array) -> jax.Array:
        mask = jnp.tril(jnp.ones((WIDTH, WIDTH)))
        keys = jax.random.split(jax.random.key(1), len(ws))
        ws = [w.astype(jnp.bfloat16).astype(jnp.float32) for w in ws]
        for w, key in zip(ws, keys, strict=True):
            noise = jax.random.uniform(key, (WIDTH,))
            x = marks(jnp.tanh(x @ (w * mask)) * noise)
        return jnp.mean(x**2)

    graph = graph_of(sgd(loss), params(3))
    cuts = cut_forward(graph, [[0], [1], [2, 3]])
    assert links(cuts) == [(0, 1, True), (1, 2, True)]
    repeated = {graph.parts.loop[i].primitive.name for i in cuts[1].segments[0]}
    assert {"iota", "random_split", "convert_element_type"} <= repeated
    casts = [
        i
        for i in cuts[1].segments[0]
        if not {*graph.parts.wrt}.isdisjoint(variables(graph.parts.loop[i].invars))
    ]
    assert len(casts) == 1, "of the parameters, only the stage's own are cast"
    check(staged(sgd(loss), params(3), X, stages=[[0], [1], [2, 3]]))


def test_integers_are_sent_without_a_way_back() -> None:
    def loss(ws: Any, x: jax.Array) -> jax.Array:
        logits = marks(x @ ws[0])
        chosen = jnp.argmax(logits, axis=1)
        y, chosen = marks((jnp.tanh(logits @ ws[1]), chosen))
        return jnp.mean((y @ ws[2])[jnp.arange(ROWS), chosen])

    graph = graph_of(sgd(loss), params(3))
    cuts = cut_forward(graph, [[0, 1], [2]])
    assert links(cuts) == [(0, 1, False), (0, 1, True)]
    check(staged(sgd(loss), params(3), X, stages=[[0, 1], [2]]))


def test_values_that_no_parameter_reaches_are_sent_without_a_way_back() -> None:
    def loss(ws: Any, x: jax.Array) -> jax.Array:
        features = marks(jnp.cos(x @ jnp.ones((WIDTH, WIDTH))))  # too dear to repeat
        y = marks(jnp.tanh(x @ ws[0]))
        return jnp.mean((y @ ws[1] + features) ** 2)

    cuts = cut_forward(graph_of(sgd(loss), params(2)), [[0], [1], [2]])
    assert links(cuts) == [(0, 2, False), (1, 2, True)]
    check(staged(sgd(loss), params(2), X, stages=3))


def test_a_derivative_that_the_user_stopped() -> None:
    """Cotangents of what goes through `stop_gradient` are zeros, and sums stay right."""

    def loss(ws: Any, x: jax.Array) -> jax.Array:
        a = marks(jnp.tanh(x @ ws[0]))
        b = marks(jnp.tanh(jax.lax.stop_gradient(a) @ ws[1]))
        return jnp.mean((b @ ws[2] + a) ** 2)

    for stages in ([[0], [1], [2]], [[0], [1, 2]], [[0, 1], [2]]):
        check(staged(sgd(loss), params(3), X, stages=stages))


def test_parameters_made_before_the_gradient() -> None:
    """The gradient is taken by something computed from the state."""

    def step(state: Any, x: jax.Array) -> Any:
        norm = jnp.sqrt(sum(jnp.sum(w**2) for w in state))
        ws = [w / norm for w in state]
        loss, grads = jax.value_and_grad(chain)(ws, x)
        return [w - 0.1 * g for w, g in zip(state, grads, strict=True)], (loss, norm)

    cuts = cut_forward(graph_of(step, params(3)), [[0], [1], [2, 3]])
    assert [len(cut.before) > 0 for cut in cuts] == [True, True, True]
    check(staged(step, params(3), X, stages=[[0], [1], [2, 3]]))


def test_results_are_of_the_stage_that_makes_them() -> None:
    def loss(ws: Any, x: jax.Array) -> Any:
        a = marks(jnp.tanh(x @ ws[0]))
        b = marks(jnp.tanh(a @ ws[1]))
        aux = {"a": jnp.mean(a), "b": jnp.mean(b), "w": ws[1], "x": jnp.sum(x), "three": 3}
        return jnp.mean((b @ ws[2]) ** 2), aux

    step = sgd(loss, has_aux=True)
    graph = graph_of(step, params(3))
    cuts = cut_forward(graph, [[0], [1], [2]])
    of = [{graph.parts.results[r][1] for r in cut.results} for cut in cuts]
    assert graph.parts.loss in of[2] and graph.parts.inputs[1] in of[2]
    assert sum(map(len, (cut.results for cut in cuts))) == len(graph.parts.results)
    check(staged(step, params(3), X, stages=3))


def test_a_loss_that_an_earlier_stage_completes() -> None:
    """What comes after it is aux only."""

    def loss(ws: Any, x: jax.Array) -> Any:
        a = marks(jnp.tanh(x @ ws[0]))
        value = marks(jnp.mean((a @ ws[1]) ** 2))
        return value, jnp.mean(jnp.tanh(a @ ws[2]))

    step = sgd(loss, has_aux=True)
    cuts = cut_forward(graph_of(step, params(3)), [[0], [1], [2]])
    assert 0 in cuts[1].results and 0 not in cuts[2].results
    check(staged(step, params(3), X, stages=3))


def test_outputs_of_one_value_twice() -> None:
    def loss(ws: Any, x: jax.Array) -> Any:
        a = marks(jnp.mean(jnp.tanh(x @ ws[0])))
        return a, {"again": a, "also": a * 1.0}

    def step(state: Any, x: jax.Array) -> Any:
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state, x)
        new = jax.tree.map(lambda p, g: p - g, state, grads)
        return new, (value, value, aux, new[0])

    check(staged(step, params(1), X, stages=1))
    check(staged(step, params(1), X, stages=[[0], [1]]))


def test_rows_that_are_returned_as_they_are() -> None:
    def step(state: Any, x: jax.Array) -> Any:
        y = jnp.cos(x)
        loss, grads = jax.value_and_grad(lambda ws: chain(ws, y))(state)
        new = jax.tree.map(lambda p, g: p - g, state, grads)
        return new, (loss, x, y, x)

    check(staged(step, params(2), X, stages=3))


def test_stages_once_per_pipeline() -> None:
    cuts = cut_forward(graph_of(sgd(chain), params(2)), [[0], [1, 2]])
    twice = replicate(cuts, 2)
    assert [cut.index for cut in twice] == [0, 1, 2, 3]
    assert links(twice) == [(0, 1, True), (2, 3, True)]
    assert [cut.layers for cut in twice[2:]] == [cut.layers for cut in cuts]
    assert [cut.index for cut in cuts] == [0, 1], "the given ones are as they were"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([[0], [2, 3]], "layer 1 is on no stage: every layer from 0 to 3 must be on exactly one"),
        ([[0, 1], [1, 2, 3]], "layer 1 is on two stages"),
        ([[0, 1], [2, 3, 4]], "layer 4 does not exist: every layer from 0 to 3"),
        ([[0, 1], [2, 3, -1]], "layer -1 does not exist"),
        (
            [[2, 3], [0, 1]],
            r"layers must be in order over the stages; found \[\[2, 3\], \[0, 1\]\]",
        ),
        ([[1, 0], [2, 3]], "layers must be in order"),
        ([[0, 1, 2, 3], []], "stage 1 of 2 has no layer; the model has 4 layers.*larger layer_num"),
        ([], "layer 0 is on no stage"),
    ],
)
def test_assignments_that_are_refused(stages: Any, message: str) -> None:
    graph = graph_of(sgd(chain), params(3))
    assert graph.num_layers == 4
    with pytest.raises(StepError, match=message):
        cut_forward(graph, stages)
