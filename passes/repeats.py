"""Identical layers: which decision nodes may share one decision.

In: a `Contraction`. Out: a class per node; nodes of one class get the same strategy, so a model of
96 layers costs the integer program as much as a model of one. Sharing restricts the search, it
never changes a price: costs of a class are the sums over its members.

Repeated blocks are found in the sequence of costly ops, as the longest stretch with a period of at
least two of them (a stack of single dense layers keeps the freedom to alternate, as
Megatron's column and row splits do). Parameters, gradients and updates follow by colour refinement
(Weisfeiler-Lehman) from the ops they touch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from alpa_lite.ir.graph import BACKWARD, FORWARD, UPDATE
from alpa_lite.passes import op_traits
from alpa_lite.passes.decision_graph import Contraction, Node

_ROUNDS = 3
_MIN_PERIOD = 2


def share_classes(
    contraction: Contraction, marks: Mapping[str, str] | None = None
) -> tuple[int, ...]:
    """Class of each node; classes are numbered in the order of their first node.

    Args:
      contraction: the decision graph.
      marks: input path -> text; inputs with different marks never share (pins of one layer must
        not bind the others).
    """
    marked = _marked_nodes(contraction, marks or {})
    tokens = _op_tokens(contraction)
    blocks = _block_positions(contraction, tokens)
    neighbours = _neighbours(contraction)
    colors = [
        hash((_first_color(contraction, node, tokens, blocks), marked.get(node.id)))
        for node in contraction.nodes
    ]
    fixed = [any(o in blocks for o in node.ops) for node in contraction.nodes]
    for _ in range(_ROUNDS):
        colors = [
            color
            if fixed[i]
            else hash((color, tuple(sorted((r, colors[n]) for r, n in neighbours[i]))))
            for i, color in enumerate(colors)
        ]
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(color, len(numbers)) for color in colors)


def find_repeats(
    tokens: Sequence[int], heavy: Sequence[bool], min_period: int = _MIN_PERIOD
) -> dict[int, tuple[int, int]]:
    """Positions inside repeated blocks: index -> (which run of blocks, offset in the block).

    Args:
      tokens: equal numbers for equal ops, in program order.
      heavy: which ops are costly.
      min_period: least number of costly ops in a block.
    """
    found: dict[int, tuple[int, int]] = {}
    todo = [(0, len(tokens))]
    array = np.asarray(tokens)
    runs = 0
    while todo:
        low, high = todo.pop()
        run = _longest_run(array, heavy, low, high, min_period)
        if run is None:
            continue
        start, stop, period = run
        for i in range(start, stop):
            found[i] = (runs, (i - start) % period)
        runs += 1
        todo += [(low, start), (stop, high)]
    return found


def _longest_run(
    tokens: np.ndarray, heavy: Sequence[bool], low: int, high: int, min_period: int
) -> tuple[int, int, int] | None:
    """(start, stop, period) of the longest repetition within `tokens[low:high]`."""
    at = np.array([i for i in range(low, high) if heavy[i]], dtype=int)
    best: tuple[int, int, int] | None = None
    for period in range(min_period, len(at) // 2 + 1):
        start, length = _longest_true(tokens[at[:-period]] == tokens[at[period:]])
        if length < period or (best and length + period <= best[1]):
            continue
        best = (start, length + period, period)
    if best is None:
        return None
    first, _, period = best
    step = int(at[first + period] - at[first])
    same = tokens[low : high - step] == tokens[low + step : high]
    start, stop = _true_around(same, int(at[first]) - low)
    if stop - start < step:
        return None
    return low + start, low + stop + step, step


def _longest_true(flags: np.ndarray) -> tuple[int, int]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(int), [0]))))
    if not len(edges):
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    best = int(np.argmax(lengths))
    return int(edges[2 * best]), int(lengths[best])


def _true_around(flags: np.ndarray, at: int) -> tuple[int, int]:
    if at >= len(flags) or not flags[at]:
        return at, at
    before = np.flatnonzero(~flags[:at])
    after = np.flatnonzero(~flags[at:])
    return (int(before[-1]) + 1 if len(before) else 0), (
        at + int(after[0]) if len(after) else len(flags)
    )


def _op_tokens(contraction: Contraction) -> list[int]:
    numbers: dict[Hashable, int] = {}
    tokens = []
    for op in contraction.ops:
        key: Hashable = op.key
        if op.kind != "op":
            avals = [contraction.values[v].aval for v in (*op.operands, *op.results)]
            key = (op.kind, tuple((a.shape, a.dtype) for a in avals), op.phase)
        tokens.append(numbers.setdefault((key, op.weight), len(numbers)))
    return tokens


def _block_positions(contraction: Contraction, tokens: Sequence[int]) -> dict[int, Hashable]:
    """Repeats among forward and backward ops, by flat op id."""
    found: dict[int, Hashable] = {}
    for phase, products in ((FORWARD, 1), (BACKWARD, 2)):
        # A product of the forward pass has two in the backward pass, one for each operand.
        ids = [op.id for op in contraction.ops if op.kind == "op" and op.phase == phase]
        heavy = [op_traits.is_costly(contraction.ops[i]) for i in ids]
        repeats = find_repeats([tokens[i] for i in ids], heavy, products * _MIN_PERIOD)
        found |= {ids[i]: (phase, *position) for i, position in repeats.items()}
    return found


def _first_color(
    contraction: Contraction, node: Node, tokens: Sequence[int],
    blocks: dict[int, Hashable],
) -> int:  # fmt: skip
    def color(o: int) -> Hashable:
        if o in blocks:
            return blocks[o]
        op = contraction.ops[o]
        # An op of the model outside of any repetition is like no other.
        return ("alone", o) if op.kind == "op" and op.phase != UPDATE else ("like", tokens[o])

    return hash(tuple(color(o) for o in node.ops))


def _marked_nodes(contraction: Contraction, marks: Mapping[str, str]) -> dict[int, Hashable]:
    marked: dict[int, tuple[str, ...]] = {}
    for name, op in contraction.input_links().items():
        if name in marks:
            node = contraction.node_of[op]
            marked[node] = (*marked.get(node, ()), marks[name])
    return dict(marked)


def _neighbours(contraction: Contraction) -> list[list[tuple[tuple[int, int], int]]]:
    """For each node: ((direction, operand position), other node)."""
    result: list[list[tuple[tuple[int, int], int]]] = [[] for _ in contraction.nodes]
    for op in contraction.ops:
        for position, value in enumerate(contraction.operands[op.id]):
            u, v = contraction.node_of[contraction.definition[value]], contraction.node_of[op.id]
            if u != v:
                result[v].append(((0, position), u))
                result[u].append(((1, position), v))
    return result
