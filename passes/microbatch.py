"""Gradient accumulation: what runs once per microbatch, and how its outputs combine.

The loss is a mean over the batch; so loss, gradients and floating-point aux are averaged, integer
aux are summed, per-example outputs are concatenated. Anything else that can be told is an error
that names the output; what is assumed is a note of the plan.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from alpa_lite.errors import StepError
from alpa_lite.ir.graph import Graph, Literal, Op, Operand
from alpa_lite.ir.trace import TracedStep
from alpa_lite.passes.microbatch_flow import BatchFlow, batch_flow

MEAN = "mean"
SUM = "sum"
CONCATENATE = "concatenate"


@dataclass(frozen=True, slots=True, eq=False)
class Microbatching:
    """Which part of the outermost graph runs once per microbatch.

    Attributes:
      num_microbatches: how many.
      loop_ops: ids of the graph's ops inside the loop.
      invariants: graph value ids read by the loop and defined outside of it.
      keys: the invariants that are PRNG keys, folded with the microbatch index.
      outputs: graph value ids that leave the loop, gradients left out.
    """

    num_microbatches: int
    loop_ops: frozenset[int] = frozenset()
    invariants: tuple[int, ...] = ()
    keys: frozenset[int] = frozenset()
    outputs: tuple[int, ...] = ()

    @property
    def is_loop(self) -> bool:
        """Whether something runs once per microbatch, be there only one."""
        return self.num_microbatches > 1 or bool(self.loop_ops)


@dataclass(frozen=True, eq=False)  # without slots, as what it shows is found once
class TracedTwice:
    """A step traced at two batch sizes, and what comparing the traces shows.

    Attributes:
      full: at the full batch size.
      micro: at microbatch size.
    """

    full: TracedStep
    micro: TracedStep

    @functools.cached_property
    def resized_inputs(self) -> frozenset[int]:
        """Inputs of the microbatch trace that are smaller than those of the whole batch."""
        full, micro = self.full.graph, self.micro.graph
        pairs = zip(full.inputs, micro.inputs, strict=True)
        return frozenset(b for a, b in pairs if full.values[a].shape != micro.values[b].shape)

    @functools.cached_property
    def loop_results(self) -> frozenset[int]:
        """Values of the microbatch trace that the accumulation loop makes."""
        graph = self.micro.graph
        if len(graph.grad_regions) != 1:
            return frozenset()  # `find_microbatch_loop` says so
        members = _loop_ops(graph, self.resized_inputs)
        return frozenset(r for op in graph.ops if op.id in members for r in op.results)

    @functools.cached_property
    def flow(self) -> BatchFlow | None:
        """How values depend on the rows; None if the two traces differ in more than sizes."""
        return batch_flow(self.full.graph, self.micro.graph, self.resized_inputs)


def check_outputs(
    full: TracedStep, micro: TracedStep, count: int, both: TracedTwice | None = None
) -> tuple[str, ...]:
    """How each output leaf combines.

    Args:
      full: the step traced at the full batch size.
      micro: the same at microbatch size.
      count: number of microbatches.
      both: these two traces, if they are compared elsewhere too.

    Returns:
      Per output `mean`, `sum`, `concatenate`, or `""` where nothing needs combining.

    Raises:
      StepError: an output has no clear meaning; it is named.
    """
    names = micro.graph.output_names
    if count == 1:
        return ("",) * len(names)
    both = both or TracedTwice(full, micro)
    _check_update_reads(full, micro, count)
    _check_update_is_same(both, count)
    from_loop = both.loop_results
    rows = from_loop | both.resized_inputs
    kinds = []
    for name, whole, part in zip(names, full.graph.outputs, micro.graph.outputs, strict=True):
        if isinstance(whole, Literal) or isinstance(part, Literal):
            _check_same_constant(name, whole, part, count)
            kinds.append("")
            continue
        a, b = full.graph.values[whole], micro.graph.values[part]
        if a.shape == b.shape:
            if part in from_loop:
                _check_combines(f"output {name}", a.dtype, count)
            kinds.append(MEAN if jnp.issubdtype(a.dtype, jnp.inexact) else SUM)
        elif a.shape[1:] == b.shape[1:] and a.shape[0] == count * b.shape[0]:
            if part not in rows:
                raise StepError(
                    f"output {name} has a row per example, {list(a.shape)}, but depends on no row "
                    f"of the batch, so {count} microbatches do not make up its parts. Drop it or "
                    "use num_microbatches=1."
                )
            kinds.append(CONCATENATE)
        else:
            raise StepError(
                f"output {name} has shape {list(a.shape)} for the whole batch and "
                f"{list(b.shape)} for one of {count} microbatches; it is neither per "
                "example nor independent of the batch size, so microbatches cannot be combined. "
                "Drop it or use num_microbatches=1."
            )
    _check_flow(both, count)
    return tuple(kinds)


def combination_notes(
    full: TracedStep, micro: TracedStep, kinds: tuple[str, ...], count: int,
    both: TracedTwice | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """What several microbatches assume, and how they were combined: notes for the plan.

    Args:
      full: the step traced at the full batch size.
      micro: the same at microbatch size.
      kinds: how each output leaf combines, from `check_outputs`.
      count: number of microbatches.
      both: these two traces, if they are compared elsewhere too.
    """
    if count == 1:
        return ()
    both = both or TracedTwice(full, micro)
    names: dict[str, list[str]] = {MEAN: [], SUM: [], CONCATENATE: []}
    for name, value, kind in zip(micro.graph.output_names, micro.graph.outputs, kinds, strict=True):
        if kind and value in both.loop_results:
            names[kind].append(name)
    texts = {MEAN: "averaged", SUM: "summed", CONCATENATE: "put back in the order of the batch"}
    how = "; ".join(f"{texts[kind]}: {_some(found)}" for kind, found in names.items() if found)
    notes = [
        f"with {count} microbatches the loss is taken to be a mean over the batch, and gradients "
        "are averaged; a loss that is a sum would be too small, and statistics such as those of "
        f"batch norm are of one microbatch. {how}".rstrip(". ")
    ]
    flow = both.flow
    if flow is None:
        notes.append(
            "the step is not traced alike for the batch and for a microbatch: whether its outputs "
            "can be combined was checked by their types and shapes only"
        )
    else:
        notes += dict.fromkeys(
            f"{op.name} at {op.source or op.scope or 'an unknown place'} acts across the rows of "
            f"one of {count} microbatches, not of the batch"
            for op in flow.across
        )
    return tuple(notes)


def _some(names: list[str]) -> str:
    """Names for a note, which has room for a few."""
    more = len(names) - _NAMES_IN_NOTES
    listed = ", ".join(names[:_NAMES_IN_NOTES])
    return f"{listed} and {more} more" if more > 0 else listed


_NAMES_IN_NOTES = 8


def _check_flow(both: TracedTwice, count: int) -> None:
    """Nothing leaves the loop that comes from the rows in a way that cannot be combined."""
    micro, flow = both.micro, both.flow
    if flow is None or not both.loop_results:
        return
    if flow.twice:
        op = flow.twice[0]
        raise StepError(
            f"rows of the batch interact: {op.name} at {op.source or op.scope or 'the loss'} "
            f"multiplies every row with every other row, as a contrastive loss does, and {count} "
            "microbatches would see only pairs of their own. Use num_microbatches=1."
        )
    (region,) = micro.graph.grad_regions
    after = {v for op in micro.graph.ops[region.last_op :] for v in op.operand_ids}
    named = {v: "an aux output of the loss function" for v in region.aux if v in after}
    if region.loss is not None:
        named[region.loss] = "the loss"
    for name, value in zip(micro.graph.output_names, micro.graph.outputs, strict=True):
        if not isinstance(value, Literal) and value in both.loop_results:
            named[value] = f"output {name}"
    for value, what in named.items():
        problem = flow.flows[value].problem() if value in flow.flows else ""
        if problem:
            raise StepError(
                f"{what} cannot be combined over {count} microbatches: {problem}, or use "
                "num_microbatches=1."
            )


def _check_update_reads(full: TracedStep, micro: TracedStep, count: int) -> None:
    """The update may not read per-example outputs of the loss function: it sees only their mean."""
    regions = zip(full.graph.grad_regions, micro.graph.grad_regions, strict=False)
    for whole, part in regions:
        for a, b in zip(whole.aux, part.aux, strict=True):
            shapes = full.graph.values[a].shape, micro.graph.values[b].shape
            reader = next(
                (op for op in micro.graph.ops[part.last_op :] if b in op.operand_ids), None
            )
            if shapes[0] != shapes[1] and reader is not None:
                raise StepError(
                    f"{reader.name} at {reader.source or reader.scope or 'the update'} reads an "
                    f"aux output of the loss function of shape {list(shapes[0])} after the "
                    f"gradient was taken; with {count} microbatches there is no such array. "
                    "Compute what is needed inside the loss function, or use num_microbatches=1."
                )


def _check_update_is_same(both: TracedTwice, count: int) -> None:
    """The update may not know the batch size: it runs once, but is traced at microbatch size."""
    full, micro = both.full, both.micro
    if not len(full.graph.grad_regions) == len(micro.graph.grad_regions) == 1:
        return  # `find_microbatch_loop` says so
    (whole,), (part,) = full.graph.grad_regions, micro.graph.grad_regions
    batch = both.resized_inputs
    after = full.graph.ops[whole.last_op :], micro.graph.ops[part.last_op :]
    for a, b in itertools.zip_longest(*after):
        if b is not None and batch & set(b.operand_ids):
            return  # `find_microbatch_loop` says so
        if a is None or b is None or _shape_of(full.graph, a) != _shape_of(micro.graph, b):
            op = a or b
            raise StepError(
                f"{op.name} at {op.source or op.scope or 'the update'} depends on the batch size "
                f"after the gradient was taken, which has no meaning with {count} microbatches. "
                "Compute it in the loss function and return it as aux, or use num_microbatches=1."
            )
        for value in b.operand_ids:
            if value in part.aux:
                where = f"an aux output of the loss function, read by {b.name} at {b.source},"
                _check_combines(where, micro.graph.values[value].dtype, count)


def _shape_of(graph: Graph, op: Op) -> tuple[object, ...]:
    """What two ops have in common if they do the same whatever the batch size."""
    literals = [str(o.value) for o in op.operands if isinstance(o, Literal)]
    return op.name, *literals, *(graph.values[v].shape for v in (*op.operand_ids, *op.results))


def _check_same_constant(name: str, whole: Operand, part: Operand, count: int) -> None:
    if isinstance(whole, Literal) and isinstance(part, Literal):
        if np.array_equal(whole.value, part.value):
            return
        text = f"is {whole.value} for the whole batch and {part.value}"
    else:
        text = "depends on the whole batch in another way than"
    raise StepError(
        f"output {name} {text} for one of {count} microbatches, so microbatches cannot be "
        "combined. Drop it or use num_microbatches=1."
    )


def _check_combines(what: str, dtype: Any, count: int) -> None:
    if not jnp.issubdtype(dtype, jnp.number):
        raise StepError(
            f"{what} is of type {dtype}: floats are averaged over {count} microbatches and "
            "integers summed, but this has no clear meaning. Convert it to a number or use "
            "num_microbatches=1."
        )


def find_microbatch_loop(
    step: TracedStep, batch_inputs: frozenset[int], num_microbatches: int
) -> Microbatching:
    """What must run once per microbatch: all that the batch reaches, up to the gradient.

    Raises:
      ValueError: there is not exactly one captured gradient, or something after the gradient
        reads the batch.
    """
    graph = step.graph
    if len(graph.grad_regions) != 1:
        raise ValueError(
            f"{num_microbatches} microbatches need a step with exactly one gradient computation at "
            f"its top level; found {len(graph.grad_regions)}. Call alpa_lite.value_and_grad (or "
            "jax.value_and_grad looked up inside the step) once, or use num_microbatches=1."
        )
    (region,) = graph.grad_regions
    batch = {graph.inputs[i] for i in batch_inputs}
    members = _loop_ops(graph, batch)
    tainted = batch | {r for op in graph.ops if op.id in members for r in op.results}
    tainted -= {region.loss, *region.aux, *region.grads}
    for op in graph.ops[region.last_op :]:
        if set(op.operand_ids) & tainted:
            raise ValueError(
                f"{op.name} at {op.source or op.scope} reads the batch after the gradient was "
                f"taken, which has no meaning with {num_microbatches} microbatches. Compute it "
                "in the loss function and return it as aux, or use num_microbatches=1."
            )
    made = {r for op in graph.ops if op.id in members for r in op.results}
    read = dict.fromkeys(v for op in graph.ops if op.id in members for v in op.operand_ids)
    invariants = tuple(v for v in read if v not in made and v not in batch)
    keys = frozenset(v for v in invariants if graph.values[v].is_key) | _raw_keys(graph, members)
    outside = {v for op in graph.ops if op.id not in members for v in op.operand_ids}
    outside |= {o for o in graph.outputs if not isinstance(o, Literal)}
    outputs = tuple(v for v in sorted(made & outside) if v not in region.grads)
    return Microbatching(
        num_microbatches, frozenset(members), invariants, keys & set(invariants), outputs
    )


def _loop_ops(graph: Graph, batch: Set[int]) -> set[int]:
    """Ops that differ from microbatch to microbatch: they read the batch, or random keys.

    What the loss function computes from neither (casts of parameters, counters) runs once.
    """
    (region,) = graph.grad_regions
    varying = set(batch)
    members = set()
    for op in graph.ops[: region.last_op]:
        draws = op.id >= region.first_op and (
            op.name == "random_wrap" or any(graph.values[v].is_key for v in op.operand_ids)
        )
        if draws or varying & set(op.operand_ids):
            members.add(op.id)
            varying |= set(op.results)
    return members


def _raw_keys(graph: Graph, members: set[int]) -> frozenset[int]:
    """Invariants that are PRNG keys in raw `uint32` form: something wraps them."""
    return frozenset(
        op.operand_ids[0] for op in graph.ops if op.id in members and op.name == "random_wrap"
    )
