"""Evaluates a step's graph on one device's parts, with exactly the collectives of the plan.

In: `Decisions`. The interpreter runs inside `jax.shard_map`: it walks the graph, brings every
operand from the layout it was made in to the layout its reader wants, and binds each primitive on
local parts. Whatever collective the compiled program holds was decided by the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from alpa_lite.ir.graph import Graph, Literal, Op
from alpa_lite.ir.sharding import ShardingSpec
from alpa_lite.passes.decisions import Decisions, LayoutChange, layout_change
from alpa_lite.passes.microbatch import CONCATENATE, MEAN, SUM
from alpa_lite.passes.program import FlatOp, Path
from alpa_lite.passes.reshard import ALL_GATHER, ReshardStep, plan_reshard
from alpa_lite.runtime.local_ops import LocalOp, run_op
from alpa_lite.runtime.reshard import combine, run_step

Env = dict[Any, Any]
"""Flat value id -> local array as made; (value, again, layout changes) -> after these changes."""


class Interpreter:
    """Runs one step on one device's parts.

    Args:
      decisions: all layouts.
      output_kinds: how outputs of microbatches combine, per graph output.
    """

    def __init__(self, decisions: Decisions, output_kinds: Sequence[str]) -> None:
        self.d = decisions
        self.c = decisions.contraction
        self.program = decisions.contraction.program
        self.mesh = decisions.mesh
        self.output_kinds = output_kinds
        # Graph ops are found by path: the same body never hangs in two places.

    def run(self, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Local outputs of the whole step, in `output_specs`."""
        graph, env = self.program.graph, {}
        for position, x in enumerate(inputs):
            env[self.c.ops[self.program.link_at["input", (), position]].results[0]] = x
        self._constants(graph, (), env)
        if self.program.microbatching.num_microbatches == 1:
            self._straight(graph, (), env)
        else:
            self._accumulate(graph, env)
        return [self._output(i, env) for i in range(len(graph.outputs))]

    def output_specs(self) -> list[ShardingSpec]:
        """Layout of every output."""
        return [self._output_spec(i) for i in range(len(self.program.graph.outputs))]

    def _output_spec(self, index: int) -> ShardingSpec:
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
        x = env[value]
        for step, key in LayoutChange(value, again, (), tuple(steps)).results():
            if key not in env:
                _, late, history = key
                if late and tie is not None and _is_first_gather(history):
                    # Gather again instead of keeping the gathered array alive.
                    x, _ = jax.lax.optimization_barrier((x, tie))
                env[key] = run_step(x, step, self.mesh, again=bool(late))
            x = env[key]
        return x

    def _replicated(self, env: Env, path: Path, operand: Any) -> Any:
        """A graph operand with no pending sum and no split, for control flow."""
        if isinstance(operand, Literal):
            return operand.value
        value = self.program.value_at[path, operand]
        return self._convert(env, value, ShardingSpec.replicated(len(self.c.values[value].shape)))

    # Graphs.

    def _constants(self, graph: Graph, path: Path, env: Env) -> None:
        for value, array in graph.constants.items():
            flat = self.program.value_at[path, value]
            x = jnp.asarray(array)
            for step in plan_reshard(
                ShardingSpec.replicated(x.ndim), self.d.value_spec(flat), self.mesh
            ):
                x = run_step(x, step, self.mesh)
            env[flat] = x

    def _straight(self, graph: Graph, path: Path, env: Env) -> None:
        """Run all ops of a graph whose inputs are in `env`."""
        ends = {r.last_op: r for r in graph.grad_regions} if not path else {}
        for op in graph.ops:
            if op.id in ends:
                self._gradients(ends[op.id].grads, env)
            self._operation(graph, path, op, env)
        if len(graph.ops) in ends:
            self._gradients(ends[len(graph.ops)].grads, env)

    def _gradients(self, grads: Sequence[int], env: Env) -> None:
        for value in dict.fromkeys(grads):
            link = self._link("gradient", (), value)
            env[link.results[0]] = self._read(link, 0, env)

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
            self._constants(body, inner_path, inner)
            self._straight(body, inner_path, inner)
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
            self._constants(graph, inner_path, inner)
            self._straight(graph, inner_path, inner)
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
                self._constants(graph, inner_path, inner)
                self._straight(graph, inner_path, inner)
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

    # Gradient accumulation.

    def _accumulate(self, graph: Graph, env: Env) -> None:
        """Run the microbatch loop, then the update."""
        loop = self.program.microbatching
        (region,) = graph.grad_regions
        before = [op for op in graph.ops[: region.last_op] if op.id not in loop.loop_ops]
        for op in before:
            self._operation(graph, (), op, env)
        invariants = {v: self._read(self._link("enter", (), v), 0, env) for v in loop.invariants}
        members = [op for op in graph.ops if op.id in loop.loop_ops]
        count = loop.num_microbatches
        values = list(dict.fromkeys((*region.grads, *loop.outputs)))
        links = [self._link("gradient", (), v) for v in values]
        kinds = [MEAN if v in region.grads else self._loop_kind(v) for v in values]

        per_example = [
            link.results[0] for link, kind in zip(links, kinds, strict=True) if kind == CONCATENATE
        ]
        leaves = [op.results[0] for op in self.c.ops if op.kind == "batch"]
        blocks = math.lcm(*(self._shards(v) for v in (*leaves, *per_example)))
        batches = self._microbatches(env, blocks)

        def one(carry: list[Any], x: tuple[Any, dict[int, Any]]) -> tuple[list[Any], list[Any]]:
            index, slices = x
            inner: Env = {**env, **slices}
            for value, held in invariants.items():
                result = self._link("enter", (), value).results[0]
                inner[result] = _fold(held, index) if value in loop.keys else held
            for op in members:
                self._operation(graph, (), op, inner)
            new = [self._read(link, 0, inner) for link in links]
            sums = iter(carry)
            kept = [
                next(sums) + x for x, kind in zip(new, kinds, strict=True) if kind != CONCATENATE
            ]
            return kept, [x for x, kind in zip(new, kinds, strict=True) if kind == CONCATENATE]

        zeros = [
            jnp.zeros(
                self.d.result_specs[link.id][0].local_shape(
                    self.c.values[link.results[0]].shape, self.mesh
                ),
                self.c.values[link.results[0]].aval.dtype,
            )
            for link, kind in zip(links, kinds, strict=True)
            if kind != CONCATENATE
        ]
        sums, parts = jax.lax.scan(one, zeros, (jnp.arange(count), batches), length=count)
        sum_of, part_of = iter(sums), iter(parts)
        for link, kind in zip(links, kinds, strict=True):
            if kind == CONCATENATE:
                value = link.results[0]
                env[value] = self._join_microbatches(next(part_of), value, blocks)
            else:
                total = next(sum_of)
                env[link.results[0]] = total if kind == SUM else total / count
        for op in graph.ops:
            if op.id not in loop.loop_ops and op.id >= region.last_op:
                self._operation(graph, (), op, env)

    def _microbatches(self, env: Env, blocks: int) -> dict[int, jax.Array]:
        """Batch leaves with a leading microbatch dim, cut without communication.

        The batch is seen as `blocks` contiguous parts, as many as any leaf has shards; microbatch
        i takes the i-th share of every part, whatever the leaf's own layout.
        """
        count = self.program.microbatching.num_microbatches
        split = {}
        for op in self.c.ops[: len(self.program.graph.inputs)]:
            if op.kind == "batch":
                x = env[op.results[0]]
                mine = blocks // self._shards(op.results[0])
                x = x.reshape(mine, count, x.shape[0] // (mine * count), *x.shape[1:])
                x = jnp.moveaxis(x, 1, 0)
                split[op.results[0]] = x.reshape(count, -1, *x.shape[3:])
        return split

    def _join_microbatches(self, parts: jax.Array, value: int, blocks: int) -> jax.Array:
        """Per-example outputs of all microbatches, back in the order of the batch."""
        count, rows = parts.shape[:2]
        mine = blocks // self._shards(value)
        parts = parts.reshape(count, mine, rows // mine, *parts.shape[2:])
        return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[3:])

    def _shards(self, value: int) -> int:
        """Shards of dim 0."""
        return self.mesh.size(self.d.value_spec(value).dims[0])

    def _loop_kind(self, value: int) -> str:
        outputs = self.program.graph.outputs
        for i, output in enumerate(outputs):
            if output == value and not isinstance(output, Literal):
                return self.output_kinds[i]
        floating = jnp.issubdtype(self.program.graph.values[value].dtype, jnp.floating)
        return MEAN if floating else SUM


def _is_first_gather(history: Sequence[ReshardStep]) -> bool:
    """Whether the last of these layout changes is the first that gathers."""
    return [s.kind for s in history].index(ALL_GATHER) == len(history) - 1


def _operand_at(op: Op, key: int) -> Any:
    """The operand behind an `enter` key; branches of a cond share the operands after the index."""
    if op.name != "cond":
        return op.operands[key]
    return op.operands[1 + (key - 1) % (len(op.operands) - 1)]


def _fold(key: jax.Array, index: jax.Array) -> jax.Array:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(key, index)
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), index))
