"""Stages of a step run as what they are: values that wait for each other, and nothing else.

`run_stages` evaluates the traced graphs of all stages together, each op once, as soon as its
operands are there. Its results are those of the step if and only if the cut is right, whatever
plans, layouts and schedules come later; and it ends at all only if no two stages wait for each
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alpa_lite.ir.graph import Graph, Literal, Op
from alpa_lite.passes.pipeline import StepArgs
from alpa_lite.passes.stages.source import CutStep, LayeredStep, cut_step, layer_step
from alpa_lite.passes.stages.stage_step import Port, StageStep

QUICK_COMPILE = {"xla_backend_optimization_level": 0}
# Sums of gradients in another order.
RTOL = 2e-5


@dataclass(frozen=True, eq=False)
class Staged:
    """A step cut into stages, with the arguments it was traced for."""

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    cut: CutStep
    steps: tuple[StageStep, ...]

    @property
    def source(self) -> LayeredStep:
        return self.cut.source

    def kinds(self, stage: int) -> list[str]:
        """Kinds of a stage's inputs other than state, rows and arguments."""
        return sorted(
            p.kind
            for p in self.steps[stage].inputs
            if p.kind in ("activation", "cotangent", "update")
        )

    def state_of(self, stage: int) -> set[str]:
        """Paths of the state that lives on a stage."""
        step = self.steps[stage]
        names = step.traced.graph.input_names
        found = {n for n, p in zip(names, step.inputs, strict=True) if p.kind == "state"}
        return {name.removeprefix("state.") for name in found}


def call_of(fun: Callable[..., Any], *args: Any) -> StepArgs:
    names = ("state", "batch", "other")[: len(args)]
    return StepArgs(
        fun=fun, args=args, arg_names=names, batch_argnums=(1,), donate_argnums=(0,), name="step"
    )


def layered(fun: Callable[..., Any], *args: Any, layer_num: Any = "auto") -> LayeredStep:
    return layer_step(call_of(fun, *args), 1, layer_num)


def staged(
    fun: Callable[..., Any], *args: Any, stages: int | Sequence[Sequence[int]],
    layer_num: Any = "auto", remat: str = "none", shares: Sequence[float] = (1.0,),
) -> Staged:  # fmt: skip
    """Cut a step: `stages` are their layers, or how many of about equal numbers of layers."""
    source = layered(fun, *args, layer_num=layer_num)
    if isinstance(stages, int):
        layers = np.array_split(np.arange(source.graph.num_layers), stages)
        stages = [[int(i) for i in each] for each in layers]
    cut = cut_step(source, stages, shares)
    return Staged(fun, args, cut, tuple(cut.stage(i, remat) for i in range(len(cut.cuts))))


def check(staged: Staged, *, rtol: float = RTOL) -> Staged:
    """Every output of the stages equals that of the step."""
    leaves, tree = jax.tree.flatten(staged.args)

    def both(leaves: list[Any]) -> Any:
        return staged.fun(*jax.tree.unflatten(tree, leaves)), run_stages(staged, leaves)

    wanted, found = jax.jit(both, compiler_options=QUICK_COMPILE)(leaves)
    expected = jax.tree_util.tree_flatten_with_path(wanted)[0]
    assert len(found) == len(expected)
    for (path, a), b in zip(expected, found, strict=True):
        name = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(1e-3, float(np.max(np.abs(a), initial=0.0, where=np.isfinite(a))))
        np.testing.assert_allclose(b, a, rtol=0, atol=rtol * scale, err_msg=name)
    return staged


def run_stages(staged: Staged, leaves: Sequence[Any]) -> list[Any]:
    """Outputs of the step, computed by its stages for one microbatch.

    Args:
      staged: the stages.
      leaves: of the step's arguments.
    """
    runs = [_Run(step.traced.graph) for step in staged.steps]
    mail: dict[Any, Any] = {}
    moved = True
    while moved:
        moved = False
        for index, (step, run) in enumerate(zip(staged.steps, runs, strict=True)):
            for port, value in zip(step.inputs, run.graph.inputs, strict=True):
                if value not in run.env:
                    if port.kind in ("state", "argument", "row"):
                        run.env[value] = leaves[port.position]
                    elif _address(port, index, False) in mail:
                        run.env[value] = mail[_address(port, index, False)]
            moved |= run.go_on()
            for port, x in zip(step.outputs, run.outputs(), strict=True):
                if x is not None and port.kind in ("activation", "cotangent", "update"):
                    mail[_address(port, index, True)] = x
    found: dict[int, Any] = {}
    for index, (step, run) in enumerate(zip(staged.steps, runs, strict=True)):
        for name, port, x in zip(run.graph.output_names, step.outputs, run.outputs(), strict=True):
            assert x is not None, f"stage {index} never gets to {name}"
            if port.kind in ("state", "result"):
                assert port.position not in found, f"{name} comes from two stages"
                found[port.position] = x
    return [found[i] for i in range(len(found))]


def _address(port: Port, stage: int, sent: bool) -> Any:
    """What identifies a value on its way: cotangents of one value come from several stages."""
    if port.kind == "activation":
        return port.kind, port.key.variable
    if port.kind == "cotangent":
        return port.kind, port.key.variable, stage if sent else port.key.target
    return port.kind, port.key[0], stage if sent else port.key[1]


class _Run:
    """One graph, evaluated as far as its inputs are there."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.env: dict[int, Any] = dict(graph.constants)
        self.left = list(graph.ops)

    def go_on(self) -> bool:
        """Evaluate what can be; returns whether there was any."""
        waiting = []
        for op in self.left:
            if all(v in self.env for v in op.operand_ids):
                operands = [o.value if isinstance(o, Literal) else self.env[o] for o in op.operands]
                self.env.update(zip(op.results, run_op(op, operands), strict=True))
            else:
                waiting.append(op)
        done = len(waiting) < len(self.left)
        self.left = waiting
        return done

    def outputs(self) -> list[Any]:
        """Those that are there, None for others."""
        return [
            jnp.asarray(o.value, o.aval.dtype) if isinstance(o, Literal) else self.env.get(o)
            for o in self.graph.outputs
        ]


def run_op(op: Op, operands: Sequence[Any]) -> list[Any]:
    """Results of one op."""
    if op.name == "scan":
        (body,), consts, carry = op.subgraphs, op.params["num_consts"], op.params["num_carry"]

        def one(state: Any, x: Any) -> Any:
            outs = run_graph(body, [*operands[:consts], *state, *x])
            return outs[:carry], outs[carry:]

        state, rows = jax.lax.scan(
            one, list(operands[consts : consts + carry]), list(operands[consts + carry :]),
            length=op.params["length"], reverse=op.params["reverse"],
        )  # fmt: skip
        return [*state, *rows]
    if op.name == "cond":
        branches = [lambda *xs, b=b: run_graph(b, xs) for b in op.subgraphs]
        return jax.lax.switch(operands[0], branches, *operands[1:])
    results = op.primitive.bind(*operands, **op.params)
    return list(results) if op.primitive.multiple_results else [results]


def run_graph(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    """Outputs of a whole graph."""
    run = _Run(graph)
    run.env.update(zip(graph.inputs, inputs, strict=True))
    run.go_on()
    return run.outputs()
