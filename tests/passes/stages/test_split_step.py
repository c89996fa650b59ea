"""What a split step looks like: names, places, scopes, lines; and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.extend.core import jaxpr_as_fun

from alpa_lite import compat
from alpa_lite.errors import StepError
from alpa_lite.ir import trace
from alpa_lite.ir.grad import value_and_grad_p
from alpa_lite.models import build
from alpa_lite.passes.stages.cut import cut_forward
from alpa_lite.passes.stages.layers import build_layers
from alpa_lite.passes.stages.parts import split_parts
from alpa_lite.passes.stages.update import split_update
from tests.passes.stages.scanned_steps import (
    ROWS,
    Tree,
    forward,
    layer,
    line_of,
    loss_fn,
    make_batch,
    make_params,
    traced,
    with_optax,
)


def test_scans_over_time_are_no_layer_scans() -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        x = (batch["x"] @ params["layers"]["w"][0]).T  # [time, rows]
        _, x = jax.lax.scan(lambda c, x: (0.5 * c + x, c), jnp.zeros(ROWS), x)
        return jnp.mean((x.T @ params["head"] - batch["y"]) ** 2)

    t = with_optax(loss, optax.sgd(0.1))
    split = t.split(2)
    assert split.num_pieces == 1 and split.closed is t.closed
    assert split.aliases == t.aliases and split.notes == ()
    assert [p.positions for p in split.inputs] == [(i,) for i in range(len(split.inputs))]


def test_one_piece_is_the_step_itself() -> None:
    t = with_optax(loss_fn, optax.sgd(0.1))
    assert t.split(1).closed is t.closed


def test_length_that_does_not_divide() -> None:
    t = with_optax(loss_fn, optax.sgd(0.1))
    where = line_of(loss_fn, "jax.lax.scan")
    pattern = (
        rf"the scan over 4 layers at .*{where}\b.* cannot be cut into 3 equal pieces: 4 is not "
    )
    with pytest.raises(StepError, match=pattern + r"divisible by 3\. Use one of \[2, 4\]\."):
        t.split(3)


def test_reverse_scan() -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        x, _ = jax.lax.scan(
            lambda x, p: (layer(x, p), None), batch["x"], params["layers"], reverse=True
        )
        return jnp.mean((x @ params["head"] - batch["y"]) ** 2)

    t = with_optax(loss, optax.sgd(0.1))
    with pytest.raises(StepError, match="runs in reverse and cannot be cut into 2 pieces"):
        t.split(2)


def test_number_of_pieces() -> None:
    with pytest.raises(ValueError, match="num_pieces must be at least 1, found 0"):
        with_optax(loss_fn, optax.sgd(0.1)).split(0)


def test_names_and_aliases() -> None:
    t = with_optax(loss_fn, optax.sgd(0.1))
    split = t.split(2)
    shapes = [x.shape for x in (*t.state, *t.batch)]
    names = split.input_names([*t.names, "batch.x", "batch.y"], shapes)
    assert names == [
        "params.head", "params.layers.b[0:2]", "params.layers.b[2:4]", "params.layers.w[0:2]",
        "params.layers.w[2:4]", "batch.x", "batch.y",
    ]  # fmt: skip
    assert split.aliases == {i: i for i in range(5)}
    assert split.output_names([*t.names, "loss"], [*shapes[: len(t.state)], ()]) == [
        *names[:5], "loss",
    ]  # fmt: skip
    avals = [tuple(a.shape) for a in split.closed.in_avals]
    assert avals == [a.shape for a in split.split_inputs([*t.state, *t.batch])]


def test_scopes_and_lines_are_kept() -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        with jax.named_scope("model"):
            return loss_fn(params, batch)

    def step(params: Tree, batch: Tree) -> tuple[Tree, Tree]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        with jax.named_scope("update"):
            return jax.tree.map(lambda p, g: p - jnp.clip(g, -1, 1), params, grads), value

    t = traced(step, make_params(), make_batch())
    split = t.split(2)
    scans = [e for e in forward(split).eqns if e.primitive.name == "scan"]
    # Clusters of layers tell the pieces apart by their scopes.
    assert [compat.scope_name(e.source_info) for e in scans] == ["model[0]", "model[1]"]
    for eqn in scans:
        assert line_of(loss_fn, "jax.lax.scan") in compat.source_line([eqn.source_info])
    # `clip` is a jitted function of JAX: its equations have the line of the call.
    update = [e for e in split.closed.jaxpr.eqns if e.primitive is not value_and_grad_p]
    assert {e.primitive.name for e in update} == {"max", "min", "sub"}
    for eqn in update:
        assert compat.scope_name(eqn.source_info) == "update"
        assert line_of(step, "jnp.clip") in compat.source_line([eqn.source_info])


def test_the_planner_traces_the_split_step() -> None:
    t = with_optax(loss_fn, optax.adamw(1e-2))
    split = t.split(2)
    inputs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in split.closed.in_avals]
    graph = trace(jaxpr_as_fun(split.closed), *inputs).graph
    (region,) = graph.grad_regions
    assert len(region.grads) == 5
    assert sum(op.name == "scan" for op in graph.ops) == 4  # forward and backward


@pytest.mark.parametrize("remat", [False, True])
def test_stages_of_a_split_step(remat: bool) -> None:
    """Layers are the pieces, and all that stages send each other but activations are scalars."""
    setup = build("llama-scan-test", clip_norm=1.0, num_layers=8, remat=remat)
    state = jax.eval_shape(setup.init, jax.random.key(0))
    t = traced(setup.step, state, setup.batch_shapes(2))
    split = t.split(4)
    batch = [p for place in split.inputs[len(t.state) :] for p in place.positions]
    parts = split_parts(split.closed, batch)
    layers = build_layers(parts)
    assert layers.num_layers == 4
    cuts = cut_forward(layers, [[0], [1], [2], [3]])
    assert [[link.target for link in cut.sent] for cut in cuts] == [[1], [2], [3], []]
    update = split_update(parts, cuts, split.aliases)
    variables = [getattr(v, "variable", v) for v, _, _ in update.sends]
    assert variables and {v.aval.shape for v in variables} == {()}
    # Each piece of a parameter and its moments lies on the stage that scans it.
    for name, place in zip(t.names, split.inputs, strict=False):
        if place.dim is not None:
            assert [update.input_homes[p] for p in place.positions] == [0, 1, 2, 3], name
