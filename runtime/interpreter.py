"""Evaluates a step's graph on one device's parts, with exactly the collectives of the plan.

In: `Decisions`. The interpreter runs inside `jax.shard_map`: it walks the segments of the graph,
brings every operand from the layout it was made in to the layout its reader wants, and binds each
primitive on local parts. Whatever collective the compiled program holds was decided by the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from alpa_lite.ir.graph import Graph, Literal, Op
from alpa_lite.ir.sharding import ShardingSpec
from alpa_lite.passes.decisions import Decisions, LayoutChange, layout_change
from alpa_lite.passes.program import FlatOp, Path
from alpa_lite.passes.reshard import ALL_GATHER, ReshardStep, plan_reshard
from alpa_lite.runtime.local_ops import LocalOp, run_op
from alpa_lite.runtime.reshard import combine, run_step
from alpa_lite.runtime.segments import Segment

Key = Any
"""Flat value id, or (value, again, layout changes): what a local array is."""
Env = dict[Key, Any]
"""Local arrays as made, and after layout changes."""


class Interpreter:
    """Runs one step on one device's parts.

    Args:
      decisions: all layouts.
    """

    def __init__(self, decisions: Decisions) -> None:
        self.d = decisions
        self.c = decisions.contraction
        self.program = decisions.contraction.program
        self.mesh = decisions.mesh
        # Graph ops are found by path: the same body never hangs in two places.

    def run(self, segment: Segment, env: Env) -> list[jax.Array]:
        """Run a segment whose operands are in `env`; returns its outputs, in `output_spec`."""
        for item in segment.items:
            if isinstance(item, Op):
                self._operation(self.program.graph, (), item, env)
            else:
                env[item.results[0]] = self._read(item, 0, env)
        return [self._output(i, env) for i in segment.outputs]

    def input_value(self, position: int) -> int:
        """Flat value of an input."""
        return self._link("input", (), position).results[0]

    def constant(self, value: int) -> jax.Array:
        """The local part of an array captured by the outermost graph."""
        env: Env = {}
        self._constant(self.program.graph, (), value, env)
        return env[self.program.value_at[(), value]]

    def output_spec(self, index: int) -> ShardingSpec:
        """Layout of an output."""
        if self.program.outputs[index] is None:
            return ShardingSpec(())
        link = self._output_link(index)
        return self.d.result_specs[link.id][0] if link.results else self.d.operand_specs[link.id][0]

    def _output_link(self, index: int) -> FlatOp:
        """The state or output link behind an output."""
        key = ("output", (), index)
        if key in self.program.link_at:
            return self.c.ops[self.program.link_at[key]]
        position = next(i for i, out in self.program.aliases.items() if out == index)
        return self._link("input", (), position)

    def _output(self, index: int, env: Env) -> jax.Array:
        operand = self.program.graph.outputs[index]
        if isinstance(operand, Literal):
            return jnp.asarray(operand.value, operand.aval.dtype)
        link = self._output_link(index)
        return self._read(link, 0, env) if link.operands else env[link.results[0]]

    # Reading and layout changes.

    def _read(self, op: FlatOp, position: int, env: Env, tie: Any = None) -> Any:
        """One operand in the layout in which `op` reads it.

        Args:
          op: the reader.
          position: which operand.
          env: values of the scope.
          tie: another operand; gathers that repeat one of the forward pass wait for it.
        """
        change = layout_change(self.d, op, position)
        steps = [*change.done, *change.steps]
        return self._apply(env, change.base, steps, change.again, tie)

    def _convert(self, env: Env, value: int, target: ShardingSpec) -> Any:
        steps = plan_reshard(self.d.value_spec(value), target, self.mesh)
        return self._apply(env, value, steps, "", None)

    def _apply(
        self, env: Env, value: int, steps: Sequence[ReshardStep], again: str, tie: Any
    ) -> Any:
        """A value after layout changes; every intermediate layout is made once per scope."""
        results = list(LayoutChange(value, again, (), tuple(steps)).results())
        made = next((n for n in range(len(results), 0, -1) if results[n - 1][1] in env), 0)
        x = env[results[made - 1][1] if made else value]
        for step, key in results[made:]:
            _, late, history = key
            if late and tie is not None and _is_first_gather(history):
                # Gather again instead of keeping the gathered array alive.
                x, _ = jax.lax.optimization_barrier((x, tie))
            x = env[key] = run_step(x, step, self.mesh, again=bool(late))
        return x

    def _replicated(self, env: Env, path: Path, operand: Any) -> Any:
        """A graph operand with no pending sum and no split, for control flow."""
        if isinstance(operand, Literal):
            return operand.value
        value = self.program.value_at[path, operand]
        return self._convert(env, value, ShardingSpec.replicated(len(self.c.values[value].shape)))

    # Graphs.

    def _constant(self, graph: Graph, path: Path, value: int, env: Env) -> None:
        flat = self.program.value_at[path, value]
        x = jnp.asarray(graph.constants[value])
        for step in plan_reshard(
            ShardingSpec.replicated(x.ndim), self.d.value_spec(flat), self.mesh
        ):
            x = run_step(x, step, self.mesh)
        env[flat] = x

    def _body(self, graph: Graph, path: Path, env: Env) -> None:
        """Run all ops of a nested graph whose inputs are in `env`."""
        for value in graph.constants:
            self._constant(graph, path, value, env)
        for op in graph.ops:
            self._operation(graph, path, op, env)

    def _link(self, kind: str, path: Path, key: int) -> FlatOp:
        return self.c.ops[self.program.link_at[kind, path, key]]

    def _operation(self, graph: Graph, path: Path, op: Op, env: Env) -> None:
        if op.name == "optimization_barrier":
            self._barrier(path, op, env)
        elif op.name == "scan":
            self._scan(graph, path, op, env)
        elif op.name == "while":
            self._while_loop(path, op, env)
        elif op.name == "cond":
            self._cond(path, op, env)
        else:
            self._primitive(op, self.c.ops[self.program.op_at[path, op.id]], env)

    def _primitive(self, op: Op, flat: FlatOp, env: Env) -> None:
        d, graph = self.d, flat.graph
        assert graph is not None
        at = {p: i for i, p in enumerate(flat.positions)}
        operands: list[Any] = [o.value if isinstance(o, Literal) else None for o in op.operands]
        # Operands born in this phase first: they tie later gathers to this point of the program.
        order = sorted(at, key=lambda p: self._born_early(flat, at[p]))
        tie = None
        for p in order:
            operands[p] = self._read(flat, at[p], env, tie)
            tie = operands[p] if tie is None else tie
        shapes = tuple(
            tuple(o.shape) if isinstance(o, Literal) else graph.values[o].shape for o in op.operands
        )
        rule = d.contraction.rules[flat.id]
        specs = d.operand_specs[flat.id]
        whole = tuple(
            rule.operands[at[p]] if p in at else ((),) * len(shape)
            for p, shape in enumerate(shapes)
        )
        local = LocalOp(
            op.primitive, op.params, replace(rule, operands=whole),
            tuple(
                specs[at[p]] if p in at else ShardingSpec.replicated(len(shape))
                for p, shape in enumerate(shapes)
            ),
            d.result_specs[flat.id], shapes, tuple(graph.values[r].shape for r in op.results),
        )  # fmt: skip
        operands = [
            jnp.asarray(x, o.aval.dtype) if isinstance(o, Literal) else x
            for x, o in zip(operands, op.operands, strict=True)
        ]
        results = run_op(local, operands, self.mesh)
        for value, result, (axes, how) in zip(
            flat.results, results, d.resolved[flat.id], strict=True
        ):
            env[value] = combine(result, axes, how) if axes else result

    def _born_early(self, flat: FlatOp, position: int) -> bool:
        value = self.c.operands[flat.id][position]
        return self.c.ops[self.c.definition[value]].phase != flat.phase

    def _barrier(self, path: Path, op: Op, env: Env) -> None:
        links = [self._link("barrier", path, (op.id << 16) + i) for i in range(len(op.results))]
        held = jax.lax.optimization_barrier([self._read(link, 0, env) for link in links])
        for link, x in zip(links, held, strict=True):
            env[link.results[0]] = x

    # Control flow.

    def _enter(self, path: Path, op: Op, keys: Sequence[int], env: Env) -> Env:
        """Invariant inputs of a body, each brought to its layout once, outside."""
        inner: Env = {}
        for key in keys:
            link = self._link("enter", path, (op.id << 16) + key)
            operand = _operand_at(op, key)
            inner[link.results[0]] = (
                jnp.asarray(operand.value, operand.aval.dtype)
                if isinstance(operand, Literal)
                else self._read(link, 0, env)
            )
        return inner

    def _initial(self, link: FlatOp, operand: Any, env: Env) -> Any:
        """A carry's or slice's value before the loop."""
        if isinstance(operand, Literal):
            return jnp.asarray(operand.value, operand.aval.dtype)
        return self._read(link, 0, env)

    def _carried(self, link: FlatOp, from_outside: bool, output: Any, env: Env) -> Any:
        """A carry's value after one iteration of the body."""
        if isinstance(output, Literal):
            return jnp.asarray(output.value, output.aval.dtype)
        if len(link.operands) > from_outside:
            return self._read(link, len(link.operands) - 1, env)
        return env[link.results[0]]  # the body hands it on unchanged

    def _scan(self, graph: Graph, path: Path, op: Op, env: Env) -> None:
        body, params = op.subgraphs[0], op.params
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        inner_path = (*path, (op.id, 0))
        base = self._enter(path, op, range(num_consts), env)
        carries = [
            self._link("carry", path, (op.id << 16) + num_consts + i) for i in range(num_carry)
        ]
        outside = [op.operands[num_consts + i] for i in range(num_carry)]
        first = num_consts + num_carry
        slices = [
            self._link("slice", path, (op.id << 16) + i) for i in range(first, len(op.operands))
        ]
        stacks = [
            self._link("stack", path, (op.id << 16) + i) for i in range(num_carry, len(op.results))
        ]
        init = [self._initial(link, o, env) for link, o in zip(carries, outside, strict=True)]
        xs = [self._initial(s, o, env) for s, o in zip(slices, op.operands[first:], strict=True)]

        def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            inner: Env = dict(base)
            for link, value in zip((*carries, *slices), (*carry, *x), strict=True):
                inner[link.results[0]] = value
            self._body(body, inner_path, inner)
            outs = [
                self._carried(link, not isinstance(o, Literal), out, inner)
                for link, o, out in zip(carries, outside, body.outputs, strict=False)
            ]
            ys = [
                jnp.asarray(out.value, out.aval.dtype)
                if isinstance(out, Literal)
                else self._read(link, 0, inner)
                for link, out in zip(stacks, body.outputs[num_carry:], strict=True)
            ]
            return outs, ys

        final, stacked = jax.lax.scan(
            step, init, xs, length=params["length"], reverse=params["reverse"],
            unroll=params.get("unroll", 1),
        )  # fmt: skip
        for link, value in zip(carries, final, strict=True):
            env[link.results[-1]] = value
        for link, value in zip(stacks, stacked, strict=True):
            env[link.results[0]] = value

    def _while_loop(self, path: Path, op: Op, env: Env) -> None:
        cond, body = op.subgraphs
        num_cond, num_body = op.params["cond_nconsts"], op.params["body_nconsts"]
        cond_base = self._enter(path, op, range(num_cond), env)
        body_base = self._enter(path, op, range(num_cond, num_cond + num_body), env)
        at = num_cond + num_body
        carries = [
            self._link("carry", path, (op.id << 16) + at + i) for i in range(len(op.results))
        ]
        outside = op.operands[at:]

        def scope(base: Env, graph: Graph, index: int, carry: Sequence[Any]) -> Env:
            inner = dict(base)
            for link, value in zip(carries, carry, strict=True):
                inner[link.results[0]] = value
            inner_path = (*path, (op.id, index))
            self._body(graph, inner_path, inner)
            return inner

        predicate = cond.outputs[0]
        rank = len(
            predicate.shape if isinstance(predicate, Literal) else cond.values[predicate].shape
        )

        def test(carry: Any) -> Any:
            inner = scope(cond_base, cond, 0, carry)
            goes_on = self._replicated(inner, (*path, (op.id, 0)), predicate)
            return jnp.any(goes_on) if rank else goes_on

        def step(carry: Any) -> Any:
            inner = scope(body_base, body, 1, carry)
            new = [
                self._carried(link, not isinstance(o, Literal), out, inner)
                for link, o, out in zip(carries, outside, body.outputs, strict=True)
            ]
            return select(carry, new) if rank else new

        def select(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
            """Of a batch of loops, those that are done keep their values."""
            inner = scope(cond_base, cond, 0, old)
            assert not isinstance(predicate, Literal)
            value = self.program.value_at[(*path, (op.id, 0)), predicate]
            kept = []
            for link, a, b in zip(carries, old, new, strict=True):
                spec = self.d.value_spec(link.results[0])
                goes_on = self._convert(inner, value, ShardingSpec(spec.dims[:rank]))
                mask = jax.lax.broadcast_in_dim(goes_on, a.shape, range(rank))
                kept.append(jax.lax.select_n(mask, a, b))
            return kept

        init = [self._initial(link, o, env) for link, o in zip(carries, outside, strict=True)]
        for link, value in zip(carries, jax.lax.while_loop(test, step, init), strict=True):
            env[link.results[-1]] = value

    def _cond(self, path: Path, op: Op, env: Env) -> None:
        index = self._replicated(env, path, op.operands[0])
        joins = [self._link("join", path, (op.id << 16) + i) for i in range(len(op.results))]

        def branch(b: int, graph: Graph) -> Callable[[], list[Any]]:
            inner_path = (*path, (op.id, b))
            keys = range(1 + b * len(graph.inputs), 1 + (b + 1) * len(graph.inputs))
            base = self._enter(path, op, keys, env)

            def run() -> list[Any]:
                inner = dict(base)
                self._body(graph, inner_path, inner)
                outs = []
                for join, out in zip(joins, graph.outputs, strict=True):
                    if isinstance(out, Literal):
                        outs.append(jnp.asarray(out.value, out.aval.dtype))
                    else:
                        position = join.operands.index(self.program.value_at[inner_path, out])
                        outs.append(self._read(join, position, inner))
                return outs

            return run

        index = jnp.clip(jnp.asarray(index).astype(jnp.int32), 0, len(op.subgraphs) - 1)
        results = jax.lax.switch(index, [branch(b, g) for b, g in enumerate(op.subgraphs)])
        for join, value in zip(joins, results, strict=True):
            env[join.results[0]] = value


def _is_first_gather(history: Sequence[ReshardStep]) -> bool:
    """Whether the last of these layout changes is the first that gathers."""
    return [s.kind for s in history].index(ALL_GATHER) == len(history) - 1


def _operand_at(op: Op, key: int) -> Any:
    """The operand behind an `enter` key; branches of a cond share the operands after the index."""
    if op.name != "cond":
        return op.operands[key]
    return op.operands[1 + (key - 1) % (len(op.operands) - 1)]
