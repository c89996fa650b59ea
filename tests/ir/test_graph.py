"""Graphs: FLOPs and bytes of ops, hashes, what `verify_graph` refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from alpa_lite.ir import Graph, Op, graph_hash, trace, verify_graph
from alpa_lite.ir.flops import is_matmul
from alpa_lite.ir.graph import Value, op_bytes
from alpa_lite.models import build

HERE = Path(__file__)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# FLOPs and bytes.


def flops_of(fun: Callable[..., Any], *args: Any) -> float:
    return trace(fun, *args).graph.flops


def test_flops_of_products() -> None:
    assert flops_of(jnp.matmul, floats(4, 8), floats(8, 3)) == 2 * 4 * 8 * 3
    assert flops_of(jnp.matmul, floats(5, 4, 8), floats(5, 8, 3)) == 2 * 5 * 4 * 8 * 3
    pairs = trace(lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), *[floats(2, 7, 3, 5)] * 2)
    assert pairs.graph.flops == 2 * 2 * 3 * 7 * 7 * 5


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4), (1, 8)])
def test_flops_of_convolutions(stride: int, groups: int) -> None:
    """Two per multiply-add: output elements x kernel window x input channels of a group."""
    x, kernel = floats(2, 16, 16, 8), floats(3, 3, 8 // groups, 24)
    forward = 2 * (2 * (16 // stride) ** 2 * 24) * (3 * 3 * 8 // groups)
    assert flops_of(lambda x, k: conv(x, k, stride, groups), x, kernel) == forward

    def gradients(x: jax.Array, k: jax.Array) -> Any:
        return jax.vjp(lambda x, k: conv(x, k, stride, groups), x, k)[1](
            jnp.ones((2, 16 // stride, 16 // stride, 24))
        )

    graph = trace(gradients, x, kernel).graph
    backward = [op.flops for op in graph.ops if op.name == "conv_general_dilated"]
    # Input and kernel gradient each do the work of the forward pass once more.
    assert len(backward) == 2
    assert backward == pytest.approx([forward, forward], rel=0.01)


def test_flops_of_everything_else() -> None:
    assert flops_of(jnp.tanh, floats(4, 8)) == 32
    assert flops_of(jnp.sum, floats(4, 8)) == 32
    assert flops_of(lambda x: x.reshape(32).astype(jnp.bfloat16), floats(4, 8)) == 0
    assert flops_of(lambda x: jnp.broadcast_to(x, (9, 4)).T, floats(4)) == 0


def matmul_flops(graph: Graph) -> float:
    """Of all products, each times the lengths of the scans around it."""
    total = 0.0
    for op in graph.ops:
        if op.subgraphs:
            total += op.params.get("length", 1) * sum(matmul_flops(b) for b in op.subgraphs)
        elif is_matmul(op.name):
            total += op.flops
    return total


@pytest.mark.parametrize("scan", [False, True])
def test_flops_of_a_llama_step(scan: bool) -> None:
    """Training costs 6 per token and matrix parameter, plus attention: 12 s^2 h per layer."""
    setup = build("llama3-8b", num_layers=2, seq_len=512, scan_layers=scan, remat=False)
    c, batch_size = setup.config, 4
    graph = trace(setup.step, setup.state_shapes(), setup.batch_shapes(batch_size)).graph
    head_dim = c.hidden_size // c.num_heads
    attention = 2 * c.hidden_size * (c.num_heads + c.num_kv_heads) * head_dim
    matrices = c.num_layers * (attention + 3 * c.hidden_size * c.mlp_size)
    matrices += c.vocab_size * c.hidden_size  # the head; the embedding is a lookup
    tokens = batch_size * c.seq_len
    scores = 12 * c.num_layers * batch_size * c.seq_len**2 * c.hidden_size
    closed_form = 6 * tokens * matrices + scores
    assert matmul_flops(graph) == pytest.approx(closed_form, rel=0.01)
    assert graph.flops == pytest.approx(closed_form, rel=0.02)


def test_bytes_of_an_op() -> None:
    graph = trace(lambda a, b: a @ b, floats(4, 8), floats(8, 2)).graph
    assert op_bytes(graph, graph.ops[0]) == 4 * (32 + 16 + 8)
    keys = trace(lambda k: jax.random.fold_in(k, 1), jax.eval_shape(jax.random.key, 0)).graph
    assert keys.values[0].is_key and keys.values[0].num_bytes == 8


# Hashes.


def test_the_hash_tells_graphs_apart() -> None:
    def scaled(factor: float) -> Callable[[jax.Array], jax.Array]:
        return lambda x: x * factor

    variants = [
        trace(scaled(2.0), floats(4, 8)),
        trace(scaled(3.0), floats(4, 8)),
        trace(scaled(2.0), floats(4, 16)),
        trace(scaled(2.0), jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)),
        trace(lambda x: x + 2.0, floats(4, 8)),
        trace(lambda x: (x * 2.0, 3), floats(4, 8)),
        trace(lambda x: (x * 2.0, 4), floats(4, 8)),
        trace(lambda x: x.sum(0), floats(4, 4)),
        trace(lambda x: x.sum(1), floats(4, 4)),
        trace(lambda x: jax.lax.scan(lambda c, y: (c + y, None), x[0], x)[0], floats(4, 4)),
        trace(lambda x: jax.lax.scan(lambda c, y: (c * y, None), x[0], x)[0], floats(4, 4)),
    ]
    assert len({graph_hash(v.graph) for v in variants}) == len(variants)


def test_the_hash_ignores_names_scopes_and_lines() -> None:
    def one(x: jax.Array) -> jax.Array:
        with jax.named_scope("here"):
            return x * 2.0

    def other(y: jax.Array) -> jax.Array:
        return y * 2.0

    a, b = trace(one, floats(4), arg_names=("x",)), trace(other, floats(4), arg_names=("y",))
    assert graph_hash(a.graph) == graph_hash(b.graph)


HASHED = ("gpt-test", "llama-scan-test", "moe-test", "wide-resnet-test")


def model_hashes() -> list[str]:
    setups = [build(name) for name in HASHED]
    return [graph_hash(trace(s.step, s.state_shapes(), s.batch_shapes(8)).graph) for s in setups]


def test_the_hash_is_the_same_in_another_process() -> None:
    """Whatever order sets and dicts have there."""
    root = HERE.parents[2]
    code = "from tests.ir.test_graph import model_hashes; print(*model_hashes())"
    environment = {**os.environ, "PYTHONHASHSEED": "11", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == model_hashes()


# Broken graphs.


def broken(change: Callable[[Graph], Graph]) -> None:
    graph = trace(lambda x, y: jnp.sin(x) + y, floats(2), floats(2)).graph
    verify_graph(graph)
    verify_graph(change(graph))


def with_op(graph: Graph, index: int, **changes: Any) -> Graph:
    ops: list[Op] = list(graph.ops)
    ops[index] = replace(ops[index], **changes)
    return replace(graph, ops=tuple(ops))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: with_op(g, 0, operands=(3,)), r"sin \(op 0\) reads %3 before it is defined"),
        (lambda g: with_op(g, 1, operands=(2, 99)), r"add \(op 1\) reads %99 before"),
        (lambda g: with_op(g, 1, results=(2,)), r"add \(op 1\) defines %2 again"),
        (lambda g: with_op(g, 0, results=(0,)), r"sin \(op 0\) defines %0 again"),
        (lambda g: with_op(g, 1, id=7), "op 1 carries id 7"),
        (lambda g: replace(g, values=(*g.values[:3], Value(9, None))), "value 3 carries id 9"),
        (lambda g: replace(g, outputs=(99,)), "output %99 is undefined"),
        (lambda g: replace(g, ops=g.ops[::-1]), "op 0 carries id 1"),
    ],
)
def test_verify_graph_names_what_is_wrong(change: Callable[[Graph], Graph], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        broken(change)


def test_verify_graph_looks_into_bodies() -> None:
    def fun(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, y: (jnp.sin(c) + y, None), jnp.zeros(3), x)[0]

    graph = trace(fun, floats(4, 3)).graph
    (scan,) = (op for op in graph.ops if op.subgraphs)
    (body,) = scan.subgraphs
    wrong = with_op(body, 1, operands=(2, 77))
    with pytest.raises(AssertionError, match="add .* reads %77 before it is defined"):
        verify_graph(with_op(graph, scan.id, subgraphs=(wrong,)))
    with pytest.raises(AssertionError, match="scan .* gives scan_body0 1 inputs; it takes 2"):
        verify_graph(with_op(graph, scan.id, operands=scan.operands[:1]))
