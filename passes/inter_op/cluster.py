"""Layer clustering: from ops in topological order to layers, by dynamic programming.

A *cut position* p lies before op p; L layers need L - 1 cuts, and each value alive across a cut has
to be sent if a stage ends there. Alpa (OSDI'22, section 5.2, Eq. 6) balances FLOPs and minimises
the bytes at the boundaries; here, most important first:

1. Balance: every layer has FLOPs within `(1 +- delta) mean`. If no clustering does, delta is
   raised to the smallest value for which one does, and the result says so. The lower end matters:
   without it the optimum wastes layers on the scalars behind the loss, where cuts are cheapest.
   The mean is `total / L`, except that an op above the mean counts as one mean (a large head fills
   a layer whatever is done, and must not unbalance the others): `balanced_flops`.
2. Bytes: the sum over the cuts of the bytes that cross, where a cut at a scope boundary counts a
   fifth less (`SCOPE_DISCOUNT`). So a cut leaves the scopes only to save a fifth of the bytes, and
   never between positions of equal bytes.
3. Variance of the FLOPs, counted likewise.

Of what is still equal, the clustering with earlier last cuts is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Allowed deviation of the FLOPs of a layer from the mean.
DEFAULT_DELTA = 0.5

# How much less the bytes of a cut at a scope boundary count, in hundredths.
SCOPE_DISCOUNT = 20

# More layers than this are not worth planning: the stage DP grows with their square.
MAX_AUTO_LAYERS = 128

# Sums of FLOPs may exceed a limit by this fraction: they are rounded.
_BALANCE_RTOL = 1e-9

# Cost of an unreachable position; far above any sum of bytes, far below the end of int64.
_UNREACHABLE = np.int64(1) << 61


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """Layers as ranges of ops.

    Attributes:
        cuts: Ascending cut positions; layer i has the ops `bounds[i]` to `bounds[i + 1] - 1`.
        num_ops: Number of ops.
        boundary_bytes: Bytes across all cuts together, without discount.
        layer_flops: FLOPs of each layer.
        delta: Deviation allowed in the end, as a fraction of the mean of `balanced_flops`.
        relaxed: Whether `delta` had to be raised above the one asked for.
        cuts_inside_scopes: Cuts that are not at a scope boundary.
    """

    cuts: tuple[int, ...]
    num_ops: int
    boundary_bytes: int
    layer_flops: tuple[float, ...]
    delta: float
    relaxed: bool
    cuts_inside_scopes: int

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.cuts) + 1

    @property
    def bounds(self) -> tuple[int, ...]:
        """The cuts with both ends."""
        return (0, *self.cuts, self.num_ops)


def crossing_bytes(
    producer: IntArray, last_reader: IntArray, value_bytes: IntArray, num_ops: int
) -> IntArray:
    """Bytes that cross each cut position, each value counted once however many ops read it.

    Args:
        producer: Per value, the op that produces it.
        last_reader: Per value, the last op that reads it; not after the producer if none does.
        value_bytes: Per value, its bytes. Leave out what does not move with the pipeline:
            parameters, constants, the inputs of the step.
        num_ops: Number of ops.

    Returns:
        `[num_ops + 1]`; entry p is about the cut before op p, so both ends are 0.

    Raises:
        ValueError: If a position is not that of an op.

    Example:
        >>> crossing_bytes(np.array([0, 0]), np.array([1, 2]), np.array([8, 1]), 3).tolist()
        [0, 9, 1, 0]
    """
    if producer.size and (producer.min() < 0 or max(producer.max(), last_reader.max()) >= num_ops):
        raise ValueError(f"producer and last_reader must be positions of the {num_ops} ops.")
    read = last_reader > producer
    change = np.zeros(num_ops + 2, dtype=np.int64)
    np.add.at(change, producer[read] + 1, value_bytes[read])
    np.subtract.at(change, last_reader[read] + 1, value_bytes[read])
    return np.cumsum(change)[: num_ops + 1]


def cluster_layers(
    flops: FloatArray,
    boundary_bytes: IntArray,
    scope_boundary: BoolArray | None = None,
    *,
    layer_num: int | Literal["auto"] = "auto",
    delta: float = DEFAULT_DELTA,
) -> Clustering:
    """Groups consecutive ops into layers; see the module docstring for what is best.

    Args:
        flops: `[num_ops]` FLOPs of each op, in topological order.
        boundary_bytes: `[num_ops + 1]` bytes that cross each cut position (`crossing_bytes`).
        scope_boundary: `[num_ops + 1]`, True where one block ends and the next one starts: a
            module scope, or a repeated run of ops. None if nothing is known.
        layer_num: Number of layers, or "auto" for `auto_layer_num`.
        delta: Deviation from the mean FLOPs to allow, as a fraction.

    Raises:
        ValueError: If fewer ops than layers have FLOPs, or an argument is malformed.

    Example:
        >>> flops = np.array([4.0, 0.0, 4.0, 0.0])
        >>> cluster_layers(flops, np.array([0, 9, 2, 9, 0]), layer_num=2).cuts
        (2,)
    """
    num_ops = len(flops)
    if scope_boundary is None:
        scope_boundary = np.zeros(num_ops + 1, dtype=bool)
    _verify(flops, boundary_bytes, scope_boundary, delta)
    if layer_num == "auto":
        layer_num = auto_layer_num(flops, scope_boundary)
    most = max(1, int(np.count_nonzero(flops)))
    if not 1 <= layer_num <= most:
        raise ValueError(
            f"layer_num is {layer_num}; it must be between 1 and {most}, the ops with FLOPs."
        )
    done = np.concatenate([[0.0], np.cumsum(balanced_flops(flops, layer_num))])
    smallest = _smallest_delta(done, layer_num)
    allowed = delta if smallest <= delta * (1 + _BALANCE_RTOL) else smallest
    weight = np.where(scope_boundary, 100 - SCOPE_DISCOUNT, 100)
    # The extra byte makes scope boundaries preferred where nothing crosses.
    cuts = _cheapest_cuts(done, (boundary_bytes + 1) * weight, layer_num, allowed)
    bounds = np.array([0, *cuts, num_ops])
    return Clustering(
        cuts=cuts,
        num_ops=num_ops,
        boundary_bytes=int(boundary_bytes[list(cuts)].sum()),
        layer_flops=tuple(np.add.reduceat(flops, bounds[:-1]).tolist()),
        delta=allowed,
        relaxed=allowed > delta,
        cuts_inside_scopes=int((~scope_boundary[list(cuts)]).sum()),
    )


def auto_layer_num(flops: FloatArray, scope_boundary: BoolArray) -> int:
    """How many layers there should be if the user does not say.

    With scope boundaries: one layer for each scope with at least a quarter of the FLOPs of the
    median one, of those with at least a tenth of the mean. Embeddings and norms fall below and join
    a neighbour, identical blocks stay whole, and a head of the size of a block gets a layer of its
    own. Above `MAX_AUTO_LAYERS`, equally many whole scopes share each layer. Without boundaries:
    one layer for every three heavy ops (Alpa's minimum of a layer), where heavy means at least a
    quarter of the mean of those with FLOPs.

    More layers only give the stage DP more freedom, at the price of planning time; fewer would
    forbid stages for no reason.

    Example:
        >>> flops = np.array([0.0, 4.0, 4.0, 0.5])  # embedding, two blocks, a small head
        >>> auto_layer_num(flops, np.array([True, True, True, True, True]))
        2
    """
    starts = np.flatnonzero(scope_boundary[1:-1]) + 1
    if starts.size:
        scopes = np.add.reduceat(flops, np.concatenate([[0], starts]))
        working = scopes[scopes > scopes.mean() / 10]
        count = int((working >= np.median(working) / 4).sum()) if working.size else 1
    else:
        working = flops[flops > 0]
        count = int((working >= working.mean() / 4).sum()) // 3 if working.size else 1
    shared = math.ceil(max(count, 1) / MAX_AUTO_LAYERS)
    return math.ceil(max(count, 1) / shared)


def balanced_flops(flops: FloatArray, num_layers: int) -> FloatArray:
    """FLOPs with the ops above the mean of the layers set to the mean.

    The mean m solves `sum(min(flops, m)) = num_layers * m`; it does not exceed `total / L`.

    Example:
        >>> balanced_flops(np.array([2.0, 2.0, 6.0]), 3).tolist()
        [2.0, 2.0, 2.0]
    """
    largest = np.sort(flops.astype(np.float64))[::-1][:num_layers]
    rest = flops.sum() - np.concatenate([[0.0], np.cumsum(largest)[:-1]])
    # The mean if the k largest ops are set to it, for k = 0, 1, ...
    mean = rest / (num_layers - np.arange(len(largest)))
    first = int((largest <= mean * (1 + _BALANCE_RTOL)).argmax())
    return np.minimum(flops, mean[first])


def _verify(
    flops: FloatArray, boundary_bytes: IntArray, scope_boundary: BoolArray, delta: float
) -> None:
    num_ops = len(flops)
    if num_ops == 0 or not np.isfinite(flops).all() or (flops < 0).any():
        raise ValueError("flops must hold one finite, non-negative number per op, and an op.")
    for name, array in (("boundary_bytes", boundary_bytes), ("scope_boundary", scope_boundary)):
        if array.shape != (num_ops + 1,):
            raise ValueError(f"{name} has shape {array.shape}; expected ({num_ops + 1},).")
    if boundary_bytes.dtype.kind not in "iu" or (boundary_bytes < 0).any():
        raise ValueError("boundary_bytes must be non-negative integers.")
    if int(boundary_bytes.max()) * 100 * num_ops >= int(_UNREACHABLE):
        raise ValueError("boundary_bytes are too large to be added up exactly.")
    if not delta >= 0:
        raise ValueError(f"delta is {delta}; it must not be negative.")


def _windows(done: FloatArray, num_layers: int, delta: float) -> tuple[IntArray, IntArray]:
    """For each end r, the starts `low[r] <= k < high[r]` of the layers `[k, r)` in balance."""
    mean = done[-1] / num_layers
    slack = _BALANCE_RTOL * done[-1]
    low = np.searchsorted(done, done - (1 + delta) * mean - slack, side="left")
    high = np.searchsorted(done, done - max(0.0, 1 - delta) * mean + slack, side="right")
    return low, np.minimum(high, np.arange(len(done)))


def _ends(reached: BoolArray, low: IntArray, high: IntArray) -> BoolArray:
    """Where a layer may end that starts at one of the positions."""
    count = np.concatenate([[0], np.cumsum(reached)])
    return (high > low) & (count[np.maximum(high, low)] > count[low])


def _smallest_delta(done: FloatArray, num_layers: int) -> float:
    """The smallest delta for which some clustering is in balance.

    Bisection: whether a delta will do is a matter of reachable positions, each pass O(ops layers).
    The upper end is always the deviation of a clustering, so it is exact in the end.
    """
    perfect = _deviation(done, num_layers, 0.0)
    if perfect is not None:
        return perfect
    # With this one, any clustering is in balance.
    low, high = 0.0, _deviation(done, num_layers, num_layers - 1.0)
    assert high is not None
    while high - low > _BALANCE_RTOL * high:
        middle = (low + high) / 2
        found = _deviation(done, num_layers, middle)
        if found is None:
            low = middle
        else:
            high = min(found, middle)
    return high


def _deviation(done: FloatArray, num_layers: int, delta: float) -> float | None:
    """The largest deviation in some clustering within delta, None if there is none."""
    mean = done[-1] / num_layers
    if mean == 0:
        return 0.0
    low, high = _windows(done, num_layers, delta)
    reached = np.zeros((num_layers + 1, len(done)), dtype=bool)
    reached[0, 0] = True
    for layer in range(num_layers):
        reached[layer + 1] = _ends(reached[layer], low, high)
    if not reached[-1, -1]:
        return None
    end, worst = len(done) - 1, 0.0
    for layer in reversed(range(num_layers)):
        starts = low[end] + np.flatnonzero(reached[layer, low[end] : high[end]])
        deviation = np.abs((done[end] - done[starts]) / mean - 1)
        worst = max(worst, float(deviation.min()))
        end = int(starts[deviation.argmin()])
    return worst


def _cheapest_cuts(
    done: FloatArray, cost: IntArray, num_layers: int, delta: float
) -> tuple[int, ...]:
    """The cuts with the least cost, then the least sum of squared FLOPs."""
    low, high = _windows(done, num_layers, delta)
    mean = max(done[-1] / num_layers, 1e-300)
    left = (done[-1] - done) / mean
    # Rounding of one window, for each of the other layers.
    slack = _BALANCE_RTOL * num_layers**2
    reached = np.arange(len(done)) == 0
    total = np.full(len(done), _UNREACHABLE)
    squares = np.zeros(len(done))
    total[0] = -cost[0]
    starts = np.zeros((num_layers + 1, len(done)), dtype=np.int64)
    for layer in range(1, num_layers + 1):
        reached = _ends(reached, low, high)
        # What is left must be enough for the other layers, and not too much.
        reached &= left >= (num_layers - layer) * (1 - delta) - slack
        reached &= left <= (num_layers - layer) * (1 + delta) + slack
        ends = np.flatnonzero(reached) if layer < num_layers else np.array([len(done) - 1])
        # A start costs what its cut costs.
        total, squares, starts[layer, ends] = _one_layer(
            total + cost, squares, done / mean, ends, low[ends], high[ends]
        )
    cuts, end = [], len(done) - 1
    for layer in range(num_layers, 1, -1):
        end = int(starts[layer, end])
        cuts.append(end)
    return tuple(reversed(cuts))


def _one_layer(
    total: IntArray,
    squares: FloatArray,
    done: FloatArray,
    ends: IntArray,
    low: IntArray,
    high: IntArray,
) -> tuple[IntArray, FloatArray, IntArray]:
    """Adds a layer: for each end the best start in its window, and its cost and squares."""
    width = high - low
    offset = np.concatenate([[0], np.cumsum(width)[:-1]])
    # All windows one after the other.
    start = np.arange(int(width.sum())) - np.repeat(offset - low, width)
    candidate = total[start]
    least = np.minimum.reduceat(candidate, offset)
    tied = np.flatnonzero(candidate == np.repeat(least, width))
    owner = np.searchsorted(offset, tied, side="right") - 1
    start = start[tied]
    square = squares[start] + (done[ends[owner]] - done[start]) ** 2
    first = np.searchsorted(owner, np.arange(len(ends)))
    smallest = np.minimum.reduceat(square, first)
    chosen = np.flatnonzero(square == smallest[owner])
    chosen = chosen[np.searchsorted(owner[chosen], np.arange(len(ends)))]
    new_total = np.full(len(total), _UNREACHABLE)
    new_squares = np.zeros(len(total))
    new_total[ends], new_squares[ends] = least, smallest
    return new_total, new_squares, start[chosen]
