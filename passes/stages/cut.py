"""The forward pass cut into stages: what each runs, reads and hands on.

In: `LayerGraph` and which layers each stage has. Out: a `StageCut` per stage. Values go from the
stage that makes them straight to every stage that reads them, neighbours or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from alpa_lite import compat
from alpa_lite.errors import StepError
from alpa_lite.passes.stages.layers import LayerGraph
from alpa_lite.passes.stages.parts import StepParts, variables


@dataclass(frozen=True, slots=True)
class Link:
    """A value on its way from one stage to another, once per microbatch.

    Attributes:
      variable: of `StepParts.loop`.
      source, target: stages.
      differentiable: whether a cotangent comes back.
    """

    variable: Any
    source: int
    target: int
    differentiable: bool


@dataclass(frozen=True, slots=True, eq=False)
class StageCut:
    """The forward pass of one stage.

    Attributes:
      index: of the stage; see `replicate` for several pipelines.
      layers: layers it has.
      segments: positions in `parts.loop` of what it runs, one tuple per layer, the repeated free
        equations of all layers first.
      before: positions in `parts.before` of what its forward pass reads.
      wrt: variables it differentiates by: inputs of the step or results of `before`.
      batch: batch inputs it reads.
      received, sent: values that come and go.
      results: positions in `parts.results` of what it computes.
    """

    index: int
    layers: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]
    wrt: tuple[Any, ...]
    batch: tuple[Any, ...]
    received: tuple[Link, ...]
    sent: tuple[Link, ...]
    results: tuple[int, ...]


def cut_forward(graph: LayerGraph, stages: Sequence[Sequence[int]]) -> tuple[StageCut, ...]:
    """Cut the loop.

    Args:
      graph: the layers.
      stages: per stage, its layers, ascending and consecutive.

    Raises:
      StepError: a layer is missing, comes twice or out of order, or a stage has none.
    """
    _check_assignment(graph.num_layers, stages)
    parts = graph.parts
    home: dict[Any, int] = {}
    for stage, layers in enumerate(stages):
        for layer in layers:
            for i in graph.layers[layer]:
                home |= dict.fromkeys(parts.loop[i].outvars, stage)
    free_at = {v: i for i in sorted(graph.free) for v in parts.loop[i].outvars}
    before_at = {v: i for i, eqn in enumerate(parts.before) for v in eqn.outvars}
    results: list[list[int]] = [[] for _ in stages]
    for position, (_, atom) in enumerate(parts.results):
        # What no placed equation computes is computed at the end.
        results[home.get(_key(atom), len(stages) - 1)].append(position)
    active = _differentiable(parts)
    wrt = set(variables(parts.wrt))
    drafts = []
    for stage, layers in enumerate(stages):
        own = [graph.layers[layer] for layer in layers]
        read = dict.fromkeys(v for each in own for i in each for v in _reads(parts.loop[i]))
        read |= dict.fromkeys(variables(parts.results[r][1] for r in results[stage]))
        free = _closure(read, free_at, parts.loop)
        read |= dict.fromkeys(v for i in free for v in _reads(parts.loop[i]))
        before = _closure(read, before_at, parts.before)
        drafts.append((own, free, before, read))
    links = [
        Link(v, home[v], stage, v in active)
        for stage, (_, _, _, read) in enumerate(drafts)
        for v in read
        if v in home and home[v] != stage
    ]
    return tuple(
        StageCut(
            index=stage, layers=tuple(stages[stage]), segments=(tuple(free), *own),
            before=tuple(before), wrt=tuple(v for v in read if v in wrt),
            batch=tuple(v for v in parts.inputs if v in parts.batch and v in read),
            received=tuple(link for link in links if link.target == stage),
            sent=tuple(link for link in links if link.source == stage),
            results=tuple(results[stage]),
        )
        for stage, (own, free, before, read) in enumerate(drafts)
    )  # fmt: skip


def replicate(cuts: Sequence[StageCut], count: int) -> tuple[StageCut, ...]:
    """The same stages once per pipeline: stage s of pipeline p gets index `p * stages + s`.

    Schedules with two directions run every stage on two meshes, each for its own microbatches.
    """
    num = len(cuts)

    def moved(links: Sequence[Link], by: int) -> tuple[Link, ...]:
        return tuple(
            replace(each, source=each.source + by, target=each.target + by) for each in links
        )

    return tuple(
        replace(
            cut, index=cut.index + p * num, received=moved(cut.received, p * num),
            sent=moved(cut.sent, p * num),
        )
        for p in range(count)
        for cut in cuts
    )  # fmt: skip


def _check_assignment(num_layers: int, stages: Sequence[Sequence[int]]) -> None:
    listed = [layer for layers in stages for layer in layers]
    empty = [i for i, layers in enumerate(stages) if not layers]
    if empty:
        raise StepError(
            f"stage {empty[0]} of {len(stages)} has no layer; the model has {num_layers} layers. "
            "Use fewer stages, or a larger layer_num."
        )
    missing = sorted(set(range(num_layers)) - set(listed))
    unknown = sorted(set(listed) - set(range(num_layers)))
    twice = sorted({layer for layer in listed if listed.count(layer) > 1})
    for found, what in ((unknown, "does not exist"), (twice, "is on two stages"), (missing, "")):
        if found:
            raise StepError(
                f"layer {found[0]} {what or 'is on no stage'}: every layer from 0 to "
                f"{num_layers - 1} must be on exactly one stage, in order; found {list(stages)}"
            )
    if listed != sorted(listed):
        raise StepError(f"layers must be in order over the stages; found {list(stages)}")


def _differentiable(parts: StepParts) -> set[Any]:
    """Variables that parameters reach and that have derivatives."""
    found = set(variables(parts.wrt))
    for eqn in parts.loop:
        if not found.isdisjoint(variables(eqn.invars)):
            found.update(v for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating))
    return found


def _closure(
    wanted: Iterable[Any], made_at: Mapping[Any, int], equations: Sequence[Any]
) -> list[int]:
    """Positions of the equations that make what is wanted, and what those read, ascending."""
    found: set[int] = set()
    stack = [v for v in wanted if v in made_at]
    while stack:
        i = made_at[stack.pop()]
        if i not in found:
            found.add(i)
            stack += [v for v in _reads(equations[i]) if v in made_at]
    return sorted(found)


def _reads(eqn: Any) -> list[Any]:
    return variables(eqn.invars)


def _key(atom: Any) -> Any:
    return None if compat.is_literal(atom) else atom
