"""Tracing: the graph of small functions as text, scopes, phases, sources; size of large ones."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alpa_lite.ir import Literal, format_graph, trace
from alpa_lite.ir.graph import BACKWARD, FORWARD, UPDATE
from alpa_lite.ir.trace import TracedStep
from alpa_lite.models import build

HERE = Path(__file__)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def text_of(fun: Callable[..., Any], *args: Any) -> str:
    return format_graph(trace(fun, *args, name="f").graph, scopes=False)


def expected(text: str) -> str:
    return textwrap.dedent(text).strip()


# Graphs as text.


def test_straight_line() -> None:
    assert text_of(lambda a, b: jnp.tanh(a @ b) + 1.0, floats(4, 8), floats(8, 2)) == expected(
        """
        graph f(%0:f32[4,8], %1:f32[8,2]) {
          %2:f32[4,2] = dot_general[dimension_numbers=(((1),(0)),((),())), \
preferred_element_type=float32](%0, %1)
          %3:f32[4,2] = tanh[](%2)
          %4:f32[4,2] = add[](%3, 1.0)
          return %4
        }
        """
    )


def test_outputs_may_be_inputs_and_literals() -> None:
    assert text_of(lambda x: (x, x, 3, jnp.float32(0.5)), floats(2)) == expected(
        """
        graph f(%0:f32[2]) {
          return %0, %0, 3, 0.5
        }
        """
    )


def test_unused_code_is_gone() -> None:
    assert text_of(lambda x: (jnp.sin(x), x * 2)[1], floats(2)) == expected(
        """
        graph f(%0:f32[2]) {
          %1:f32[2] = mul[](%0, 2.0)
          return %1
        }
        """
    )


@pytest.mark.smoke
def test_calls_are_inlined() -> None:
    @jax.custom_jvp
    def double(x: jax.Array) -> jax.Array:
        return x * 2.0

    double.defjvp(lambda primals, tangents: (double(*primals), tangents[0] * 2.0))

    @jax.custom_vjp
    def triple(x: jax.Array) -> jax.Array:
        return x * 3.0

    triple.defvjp(lambda x: (triple(x), None), lambda _, ct: (ct * 3.0,))

    assert text_of(lambda x: jax.jit(lambda y: triple(double(y)))(x), floats(2)) == expected(
        """
        graph f(%0:f32[2]) {
          %1:f32[2] = mul[](%0, 2.0)
          %2:f32[2] = mul[](%1, 3.0)
          return %2
        }
        """
    )


@pytest.mark.smoke
def test_scan_keeps_its_body() -> None:
    def fun(xs: jax.Array) -> Any:
        return jax.lax.scan(lambda carry, x: (carry + x.sum(), carry), jnp.float32(0), xs)

    assert text_of(fun, floats(5, 3)) == expected(
        """
        graph f(%0:f32[5,3]) {
          %1:f32[], %2:f32[5] = scan[length=5, num_carry=1, num_consts=0, reverse=False, \
unroll=1](0.0, %0)
            graph scan_body0(%0:f32[], %1:f32[3]) {
              %2:f32[] = reduce_sum[axes=(0)](%1)
              %3:f32[] = add[](%0, %2)
              return %3, %0
            }
          return %1, %2
        }
        """
    )


@pytest.mark.smoke
def test_while_keeps_condition_and_body() -> None:
    def fun(x: jax.Array, y: jax.Array) -> Any:
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * y), (0, x))

    assert text_of(fun, floats(3), floats(3)) == expected(
        """
        graph f(%0:f32[3], %1:f32[3]) {
          %2:i32[], %3:f32[3] = while[body_nconsts=1, cond_nconsts=0](%1, 0, %0)
            graph while_body0(%0:i32[], %1:f32[3]) {
              %2:pred[] = lt[](%0, 3)
              return %2
            }
            graph while_body1(%0:f32[3], %1:i32[], %2:f32[3]) {
              %3:i32[] = add[](%1, 1)
              %4:f32[3] = mul[](%2, %0)
              return %3, %4
            }
          return %2, %3
        }
        """
    )


@pytest.mark.smoke
def test_cond_keeps_its_branches() -> None:
    def fun(p: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.cond(p, lambda x: x + 1.0, lambda x: x * 2.0, x)

    assert text_of(fun, jax.ShapeDtypeStruct((), bool), floats(3)) == expected(
        """
        graph f(%0:pred[], %1:f32[3]) {
          %2:i32[] = convert_element_type[new_dtype=int32, weak_type=False](%0)
          %3:f32[3] = cond[](%2, %1)
            graph cond_body0(%0:f32[3]) {
              %1:f32[3] = mul[](%0, 2.0)
              return %1
            }
            graph cond_body1(%0:f32[3]) {
              %1:f32[3] = add[](%0, 1.0)
              return %1
            }
          return %3
        }
        """
    )


def test_control_flow_nests() -> None:
    def inner(i: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.cond(i > 1, lambda x: x + 1.0, lambda x: x, x)

    def body(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.fori_loop(0, x.shape[0], inner, carry), None

    graph = trace(lambda xs: jax.lax.scan(body, jnp.zeros(2), xs)[0], floats(5, 3)).graph
    nest = [op.name for op in graph.walk() if op.subgraphs]
    # A loop over a known range is a scan.
    assert nest == ["scan", "scan", "cond"]
    assert [len(op.subgraphs) for op in graph.walk() if op.subgraphs] == [1, 1, 2]
    outer, loop, cond = (op for op in graph.walk() if op.subgraphs)
    per_cond = 2.0  # the larger branch: one addition of two elements
    assert cond.flops == per_cond
    per_turn = sum(op.flops for op in loop.subgraphs[0].ops)
    assert loop.flops == 3 * per_turn and outer.flops == 5 * outer.subgraphs[0].flops


@pytest.mark.smoke
def test_remat_becomes_a_barrier_and_its_equations() -> None:
    def fun(x: jax.Array) -> jax.Array:
        return jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))))(x)

    names = [op.name for op in trace(fun, floats()).graph.ops]
    assert names.count("optimization_barrier") == 1
    barrier = names.index("optimization_barrier")
    assert "sin" in names[barrier:] and "cos" in names[barrier:]


def test_arrays_from_outside_are_constants() -> None:
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    graph = trace(lambda x: x @ jnp.asarray(table) + jnp.float32(2), floats(4, 2)).graph
    ((constant, array),) = graph.constants.items()
    np.testing.assert_array_equal(array, table)
    assert constant in graph.ops[0].operand_ids
    assert any(isinstance(o, Literal) and o.value == 2 for op in graph.ops for o in op.operands)


# Names, scopes, phases, sources.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.Dense(x.shape[-1], name="proj")(nn.LayerNorm(name="norm")(x))


class Tower(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = Block(name=f"block_{i}")(x)
        return x


def tower_step() -> TracedStep:
    model, tx = Tower(), optax.adam(1e-3)
    x = jnp.zeros((4, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    state = {"params": params, "opt": jax.eval_shape(tx.init, params)}

    def step(state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(model.apply(p, batch["x"]) ** 2))(
            state["params"]
        )
        updates, opt = tx.update(grads, state["opt"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss

    return trace(step, state, {"x": floats(4, 8)}, arg_names=("state", "batch"))


@pytest.mark.smoke
def test_scopes_are_module_paths() -> None:
    graph = tower_step().graph
    products = [op.scope for op in graph.ops if op.name == "dot_general"]
    blocks = [f"jvp(Tower)/block_{i}/proj" for i in range(2)]
    backward = [f"transpose(jvp(Tower))/block_{i}/proj" for i in (1, 1, 0, 0)]
    assert products == blocks + backward
    assert {op.scope for op in graph.ops if op.phase == UPDATE} == {""}


@pytest.mark.smoke
def test_phases_follow_the_gradient() -> None:
    graph = tower_step().graph
    (region,) = graph.grad_regions
    for op in graph.ops:
        inside = region.first_op <= op.id < region.last_op
        assert inside == (op.phase != UPDATE), op.name
        assert (op.phase == BACKWARD) == ("transpose(" in op.scope), op.name
    assert {FORWARD, BACKWARD, UPDATE} == {op.phase for op in graph.ops}


def test_the_gradient_region_is_aligned_with_parameters() -> None:
    step = tower_step()
    (region,) = step.graph.grad_regions
    names = dict(zip(step.graph.inputs, step.graph.input_names, strict=True))
    found = [names[p] for p in region.params if not isinstance(p, Literal)]
    assert found == [n for n in step.graph.input_names if n.startswith("state.params.")]
    for grad, param in zip(region.grads, region.params, strict=True):
        assert not isinstance(param, Literal)
        assert step.graph.values[grad].shape == step.graph.values[param].shape
    assert region.loss == step.graph.outputs[-1]


def test_paths_name_inputs_and_outputs() -> None:
    step = tower_step()
    names = step.graph.input_names
    assert names[-1] == "batch.x"
    assert "state.params.params.block_1.proj.kernel" in names
    assert "state.opt.0.mu.params.block_0.norm.scale" in names
    assert step.graph.output_names[-1] == "1"
    state = [n for n in names if n.startswith("state.")]
    assert [f"0.{n.removeprefix('state.')}" for n in state] == list(step.graph.output_names[:-1])
    assert list(step.argument_range(1)) == [len(names) - 1]


def line_of(fun: Callable[..., Any], text: str) -> int:
    """The line of this file where a function's source contains a text."""
    lines, start = inspect.getsourcelines(fun)
    return next(start + i for i, line in enumerate(lines) if text in line)


@pytest.mark.smoke
def test_sources_point_at_the_users_lines() -> None:
    graph = tower_step().graph

    def sources(*names: str) -> set[str]:
        return {op.source.split(" ")[0].rsplit(":", 1)[0] for op in graph.ops if op.name in names}

    block_line = line_of(Block, "return x + nn.Dense")
    assert sources("dot_general", "rsqrt") == {f"{HERE}:{block_line}"}
    # Optax's own lines do not count either.
    update_line = line_of(tower_step, "updates, opt = tx.update")
    assert sources("sqrt") == {f"{HERE}:{update_line}"}
    packages = ("/jax/", "/flax/", "/optax/", "/alpa_lite/")
    assert not [op.source for op in graph.walk() if any(p in op.source for p in packages)]


@pytest.mark.smoke
def test_ops_of_library_calls_point_at_the_call() -> None:
    def fun(xs: jax.Array) -> Any:
        def body(carry: jax.Array, x: jax.Array) -> Any:
            carry = carry + jnp.var(x)  # line of var
            return carry, jax.nn.gelu(x)  # line of gelu

        return jax.lax.scan(body, jnp.float32(0), xs)

    graph = trace(fun, floats(5, 3)).graph
    lines = {op.name: int(op.source.split(":")[1]) for op in graph.ops[0].subgraphs[0].ops}
    assert lines["reduce_sum"] == line_of(fun, "# line of var")
    assert lines["tanh"] == line_of(fun, "# line of gelu")


def test_models_of_this_package_are_user_code() -> None:
    setup = build("llama-test")
    graph = trace(setup.step, setup.state_shapes(), setup.batch_shapes(8)).graph
    products = [op for op in graph.walk() if op.name == "dot_general"]
    assert products and all("/alpa_lite/models/" in op.source for op in products)


def test_ops_without_user_code_have_some_source() -> None:
    graph = trace(jnp.linalg.norm, floats(3)).graph
    assert all(isinstance(op.source, str) for op in graph.ops)
    assert replace(graph.ops[0], source_infos=()).source == ""


# Size.

MEASURE = """
import resource, sys, time
from alpa_lite.models import build
from alpa_lite.ir import trace
setup = build("llama3-405b", scan_layers={scan}, remat={scan})
state = setup.state_shapes()
started = time.monotonic()
graph = trace(setup.step, state, setup.batch_shapes(8)).graph
print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, graph.flops)
"""


@pytest.mark.parametrize(
    ("scan", "limit_s"), [(True, 10), pytest.param(False, 120, marks=pytest.mark.slow)]
)
def test_a_model_of_405_billion_parameters_traces_in_little_memory(
    scan: bool, limit_s: float
) -> None:
    """Only shapes are made: 405 billion parameters, 126 layers, 54,000 ops when unrolled."""
    root = HERE.parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(scan=scan)], capture_output=True, text=True,
        check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    wall_s, peak_kib, flops = map(float, done.stdout.split())
    assert wall_s < limit_s
    assert peak_kib < 2 * 2**20
    tokens = 8 * 8192
    # 6 per parameter and token, 8 with recomputation, and attention on top.
    assert 6 <= flops / (405e9 * tokens) < 9
