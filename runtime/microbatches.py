"""A whole step in one program: straight, or with a loop over microbatches.

In: an `Interpreter` and one device's parts of the inputs, at the full batch size. Out: its parts of
the outputs. Runs inside `jax.shard_map`. What is said here of one microbatch also holds for the
programs of `phases`, which run the loop from outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alpa_lite.passes.microbatch import CONCATENATE, SUM
from alpa_lite.runtime.interpreter import Env, Interpreter
from alpa_lite.runtime.segments import Exit, Segment, StepParts, split_step


def run_step(
    interpreter: Interpreter, output_kinds: Sequence[str], inputs: Sequence[jax.Array]
) -> list[jax.Array]:
    """Local outputs of the whole step, in `Interpreter.output_spec`.

    Args:
      interpreter: of the step.
      output_kinds: how outputs of microbatches combine, per graph output.
      inputs: local parts of all inputs.
    """
    program = interpreter.program
    graph = program.graph
    parts = split_step(program, output_kinds)
    env: Env = {interpreter.input_value(i): x for i, x in enumerate(inputs)}
    for value in graph.constants:
        env[program.value_at[(), value]] = interpreter.constant(value)
    if program.microbatching.is_loop:
        interpreter.run(
            Segment("before", (*parts.items(parts.before), *parts.enters().values())), env
        )
        _run_loop(interpreter, parts, env)
        rest = parts.items(parts.after)
    else:
        rest = parts.items(graph.ops)
    outputs = tuple(range(len(graph.outputs)))
    return interpreter.run(Segment("after", (*parts.loose, *rest), (), outputs), env)


def zeros(interpreter: Interpreter, exit_: Exit) -> jax.Array:
    """The local part of a sum over no microbatch."""
    value = interpreter.c.values[exit_.value]
    spec = interpreter.d.value_spec(exit_.value)
    return jnp.zeros(spec.local_shape(value.shape, interpreter.mesh), value.aval.dtype)


def combined(exit_: Exit, total: jax.Array, count: int) -> jax.Array:
    """What the update sees of the sum over `count` microbatches."""
    return total if exit_.kind == SUM else total / count


def fold_key(key: jax.Array, index: jax.Array) -> jax.Array:
    """The key, typed or raw, of one microbatch."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(key, index)
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), index))


def batch_blocks(interpreter: Interpreter, parts: StepParts) -> int:
    """In how many contiguous parts the batch is seen: as many as any leaf has shards.

    Microbatch i takes the i-th share of every part, whatever the leaf's own layout, so no leaf is
    communicated and all leaves agree.
    """
    leaves = [op.results[0] for op in interpreter.c.ops if op.kind == "batch"]
    per_example = [e.value for e in parts.exits.values() if e.kind == CONCATENATE]
    return math.lcm(*(_shards(interpreter, v) for v in (*leaves, *per_example)))


def _run_loop(interpreter: Interpreter, parts: StepParts, env: Env) -> None:
    """Run the loop of a step whose invariants are in `env`; its results come into `env`."""
    loop = parts.program.microbatching
    count = loop.num_microbatches
    segment = Segment("loop", parts.items(parts.loop), tuple(parts.exits.values()))
    summed = [e for e in segment.exits if e.kind != CONCATENATE]
    joined = [e for e in segment.exits if e.kind == CONCATENATE]
    blocks = batch_blocks(interpreter, parts)
    enters = parts.enters()
    keys = {enters[v].results[0] for v in loop.keys}
    held = {link.results[0]: env[link.results[0]] for link in enters.values()}
    batches = {
        op.results[0]: _split(interpreter, env[op.results[0]], op.results[0], count, blocks)
        for op in interpreter.c.ops[: len(parts.program.graph.inputs)]
        if op.kind == "batch"
    }

    def one(carry: list[Any], x: tuple[Any, dict[int, Any]]) -> tuple[list[Any], list[Any]]:
        index, slices = x
        inner: Env = {v: fold_key(a, index) if v in keys else a for v, a in held.items()}
        inner |= slices
        interpreter.run(segment, inner)
        sums = [total + inner[e.value] for e, total in zip(summed, carry, strict=True)]
        return sums, [inner[e.value] for e in joined]

    start = [zeros(interpreter, e) for e in summed]
    sums, rows = jax.lax.scan(one, start, (jnp.arange(count), batches), length=count)
    for e, total in zip(summed, sums, strict=True):
        env[e.value] = combined(e, total, count)
    for e, x in zip(joined, rows, strict=True):
        env[e.value] = _join(interpreter, x, e.value, blocks)


def _split(
    interpreter: Interpreter, x: jax.Array, value: int, count: int, blocks: int
) -> jax.Array:
    """A batch leaf with a leading microbatch dim, cut without communication."""
    mine = blocks // _shards(interpreter, value)
    x = x.reshape(mine, count, x.shape[0] // (mine * count), *x.shape[1:])
    x = jnp.moveaxis(x, 1, 0)
    return x.reshape(count, -1, *x.shape[3:])


def _join(interpreter: Interpreter, rows: jax.Array, value: int, blocks: int) -> jax.Array:
    """Per-example outputs of all microbatches, back in the order of the batch."""
    count, num = rows.shape[:2]
    mine = blocks // _shards(interpreter, value)
    rows = rows.reshape(count, mine, num // mine, *rows.shape[2:])
    return jnp.moveaxis(rows, 0, 1).reshape(-1, *rows.shape[3:])


def _shards(interpreter: Interpreter, value: int) -> int:
    """Shards of dim 0."""
    return interpreter.mesh.size(interpreter.d.value_spec(value).dims[0])
