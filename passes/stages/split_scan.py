"""Cuts the scan over layers of a step along its length, so that stages can have a piece each.

In: the outer jaxpr of a step, with its `value_and_grad` equation whole. Out: `SplitStep`, an
equivalent step in which the layer scan of the loss function is a chain of shorter ones, and stacked
parameters, with all that the update combines them with, come and go as one array per piece. The
gradient is taken by the pieces, and the update runs on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from alpa_lite import compat
from alpa_lite.errors import StepError
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.stages.layer_scans import LayerScan, find_layer_scans
from alpa_lite.passes.stages.pieces import Dims
from alpa_lite.passes.stages.settle import Splitter


@dataclass(frozen=True, slots=True)
class Place:
    """Where a flat input or output of the step has gone.

    Attributes:
      positions: among the inputs or outputs of the new step, one per piece, in order.
      dim: along which it was cut into equal blocks; None if it is whole.
    """

    positions: tuple[int, ...]
    dim: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SplitStep:
    """A step whose layer scan is in pieces.

    Attributes:
      closed: the step's closed jaxpr.
      num_pieces: how many pieces; 1 if there was nothing to cut.
      inputs: per input of the step before, where it is now.
      outputs: per output of the step before, where it is now.
      aliases: input position -> output position of the state, of `closed`.
      notes: what the user should know: arrays that are concatenated, scans that stay whole.
    """

    closed: Any
    num_pieces: int
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    aliases: Mapping[int, int]
    notes: tuple[str, ...] = ()

    def split_inputs(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays for the inputs of `closed` from those for the step before."""
        return [
            piece
            for array, place in zip(arrays, self.inputs, strict=True)
            for piece in _blocks(array, place)
        ]

    def join_outputs(self, arrays: Sequence[Any]) -> list[jax.Array]:
        """Outputs of the step before from those of `closed`."""
        return [
            arrays[place.positions[0]]
            if place.dim is None
            else jnp.concatenate([arrays[p] for p in place.positions], place.dim)
            for place in self.outputs
        ]

    def input_names(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[str]:
        """Names for the inputs of `closed`; see `piece_names`."""
        return piece_names(self.inputs, names, shapes)

    def output_names(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[str]:
        """Names for the outputs of `closed`; see `piece_names`."""
        return piece_names(self.outputs, names, shapes)


def piece_names(
    places: Sequence[Place], names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> list[str]:
    """Names of arrays with their pieces written as slices.

    Args:
      places: where each array has gone.
      names: of the whole arrays.
      shapes: of the whole arrays.

    Example:
      >>> piece_names([Place((0, 1), 0), Place((2, 3), 1)], ["w", "b"], [(8, 3), (3, 4)])
      ['w[0:4]', 'w[4:8]', 'b[:,0:2]', 'b[:,2:4]']
    """
    named: list[str] = []
    for place, name, shape in zip(places, names, shapes, strict=True):
        if place.dim is None:
            named.append(name)
            continue
        size = shape[place.dim] // len(place.positions)
        before = ":," * place.dim
        starts = range(0, shape[place.dim], size)
        named += [f"{name}[{before}{start}:{start + size}]" for start in starts]
    return named


def split_scan(
    closed: Any,
    num_pieces: int,
    *,
    aliases: Mapping[int, int] | None = None,
    every_scan: bool = False,
    table: RuleTable | None = None,
) -> SplitStep:
    """Cut the scan over layers in the loss function of a step.

    That is the scan with most FLOPs among those that read, per iteration, a slice of something the
    loss is differentiated by (`find_layer_scans`). Without one, the step is returned as it is, with
    `num_pieces` 1.

    Args:
      closed: the outer jaxpr of the step, traced within `capture_gradients`.
      num_pieces: how many pieces of equal length.
      aliases: input position -> output position of every state leaf, see
        `step_contract.state_aliases`. State goes in and comes out in the same pieces.
      every_scan: cut every layer scan whose length `num_pieces` divides, such as those of an
        encoder and a decoder, not the largest alone.
      table: where sharding rules are looked up; a new one by default.

    Raises:
      StepError: the scan runs in reverse, or `num_pieces` does not divide its length.
      ValueError: `num_pieces` is not positive.
    """
    if num_pieces < 1:
        raise ValueError(f"num_pieces must be at least 1, found {num_pieces}")
    aliases = dict(aliases or {})
    table = RuleTable() if table is None else table
    cleaned = compat.remove_dead_code(closed)
    scans = find_layer_scans(cleaned, table, aliases) if num_pieces > 1 else ()
    if not scans:
        whole = (None,) * len(closed.in_avals), (None,) * len(closed.out_avals)
        return _split_step(closed, 1, *whole, aliases, ())
    _check(scans[0], num_pieces)
    chosen, notes = _choose(scans, num_pieces, every_scan)
    splitter = Splitter(num_pieces, table, frozenset(scan.key for scan in chosen))
    settled = splitter.settle_step(cleaned, aliases)
    return _split_step(
        settled.bodies[0], num_pieces, settled.in_dims, settled.out_dims, aliases,
        (*notes, *settled.notes),
    )  # fmt: skip


def _check(scan: LayerScan, num_pieces: int) -> None:
    if scan.reverse:
        raise StepError(
            f"the scan over {scan.length} layers at {scan.source} runs in reverse and cannot be "
            f"cut into {num_pieces} pieces: the last piece would come first. Store the layers in "
            "the order in which they run and scan forwards."
        )
    if scan.length % num_pieces:
        fitting = [n for n in range(2, scan.length + 1) if scan.length % n == 0]
        raise StepError(
            f"the scan over {scan.length} layers at {scan.source} cannot be cut into {num_pieces} "
            f"equal pieces: {scan.length} is not divisible by {num_pieces}. Use one of {fitting}."
        )


def _choose(
    scans: Sequence[LayerScan], num_pieces: int, every_scan: bool
) -> tuple[list[LayerScan], list[str]]:
    """The scans to cut, and notes about the others."""
    chosen, notes = [scans[0]], []
    for scan in scans[1:]:
        if not every_scan:
            reason = "the largest alone is cut"
        elif scan.reverse:
            reason = "it runs in reverse"
        elif scan.length % num_pieces:
            reason = f"{scan.length} is not divisible by {num_pieces}"
        else:
            chosen.append(scan)
            continue
        share = scan.flops / math.fsum(s.flops for s in scans) if scans[0].flops else 0.0
        notes.append(
            f"the scan over {scan.length} layers at {scan.source}, {share:.0%} of the FLOPs of all "
            f"layer scans, stays whole: {reason}"
        )
    return chosen, notes


def _split_step(
    closed: Any,
    num_pieces: int,
    in_dims: Dims,
    out_dims: Dims,
    aliases: Mapping[int, int],
    notes: tuple[str, ...],
) -> SplitStep:
    inputs, outputs = (_places(dims, num_pieces) for dims in (in_dims, out_dims))
    pairs = {
        a: b
        for i, o in aliases.items()
        for a, b in zip(inputs[i].positions, outputs[o].positions, strict=True)
    }
    return SplitStep(closed, num_pieces, inputs, outputs, pairs, notes)


def _places(dims: Dims, num_pieces: int) -> tuple[Place, ...]:
    places, start = [], 0
    for dim in dims:
        count = 1 if dim is None else num_pieces
        places.append(Place(tuple(range(start, start + count)), dim))
        start += count
    return tuple(places)


def _blocks(array: Any, place: Place) -> list[Any]:
    if place.dim is None:
        return [array]
    size = array.shape[place.dim] // len(place.positions)
    before = (slice(None),) * place.dim
    return [array[(*before, slice(i * size, (i + 1) * size))] for i in range(len(place.positions))]
