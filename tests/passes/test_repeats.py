"""Repeated layers: where they are found, and that sharing their decisions costs nothing."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpa_lite import ShardParallel
from alpa_lite.cost_model import Cluster
from alpa_lite.ir.sharding import Mesh
from alpa_lite.models import build
from alpa_lite.passes.build import PlanningInputs, solve_on_mesh
from alpa_lite.passes.pipeline import StepArgs, prepare, trace_call
from alpa_lite.passes.pricing import count_work
from alpa_lite.passes.repeats import find_repeats, share_classes
from alpa_lite.passes.rules import RuleTable
from tests.passes.acceptance_models import four_devices, mlp

# Token sequences: capital letters are costly ops, small ones cheap.


def repeats(text: str) -> str:
    """One character per token: where it is in its block, `.` outside of any."""
    found = find_repeats([ord(c) for c in text], [c.isupper() for c in text])
    return "".join(f"{found[i][1]:x}" if i in found else "." for i in range(len(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("abc", "..."),
        ("ABCD", "...."),
        ("ABAB", "0101"),
        ("ABABAB", "010101"),
        ("ABABA", "01010"),  # a block may be cut off
        ("xABAByz", ".0101.."),
        ("AABB", "...."),  # one costly op is no block
        ("AAAA", "0101"),  # single layers may alternate
        ("AAAAA", "01010"),
        ("AA", ".."),
        ("AbCAbCAbC", "012012012"),  # cheap ops belong to the block
        ("AbCdAbCeAbC", "..........."),  # of which all must be alike
        ("xAbCyAbCy", ".01230123"),
        ("yAbCyAbCz", "01230123."),  # a block may begin anywhere
        ("ABCABDABCABD", "012345012345"),  # the longest stretch, whatever its period
        ("ABABABXYZXYZXYZ", "010101012012012"),
        ("ABABABQXYZXYZXYZ", "010101.012012012"),
    ],
)
def test_blocks_of_hand_written_sequences(text: str, expected: str) -> None:
    assert repeats(text) == expected


def test_two_stretches_are_told_apart() -> None:
    text = "ABABABXYZXYZXYZ"
    found = find_repeats([ord(c) for c in text], [True] * len(text))
    runs = [found[i][0] for i in range(len(text))]
    assert len(set(runs[:6])) == len(set(runs[6:])) == 1
    assert runs[0] != runs[6]


SEQUENCES = st.lists(st.integers(0, 3), max_size=40)


@given(SEQUENCES, st.data())
def test_equal_places_hold_equal_tokens(tokens: list[int], draw: st.DataObject) -> None:
    heavy = draw.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    heavy = [heavy[tokens.index(t)] for t in tokens]  # alike ops are alike in cost
    found = find_repeats(tokens, heavy)
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, place in found.items():
        members[place].append(position)
    for positions in members.values():
        assert len({tokens[i] for i in positions}) == 1
        steps = {b - a for a, b in itertools.pairwise(positions)}
        assert len(steps) <= 1  # one period per stretch


@given(
    st.lists(st.integers(10, 15), min_size=2, max_size=6, unique=True),
    st.integers(2, 5), st.lists(st.integers(20, 29), max_size=4, unique=True),
    st.lists(st.integers(30, 39), max_size=4, unique=True),
)  # fmt: skip
def test_a_repeated_block_is_found_between_other_ops(
    block: list[int], count: int, before: list[int], after: list[int]
) -> None:
    tokens = [*before, *block * count, *after]
    found = find_repeats(tokens, [True] * len(tokens))
    inside = range(len(before), len(before) + count * len(block))
    assert set(found) == set(inside)
    assert [found[i][1] for i in inside] == list(range(len(block))) * count


# Decision graphs of models.


@functools.cache
def rule_table() -> RuleTable:
    return RuleTable()


def prepared(step: Any, state: Any, batch: Any, cluster: Cluster) -> PlanningInputs:
    call = StepArgs(
        fun=step, args=(state, batch), arg_names=("state", "batch"), batch_argnums=(1,),
        donate_argnums=(0,), name="step",
    )  # fmt: skip
    return prepare(trace_call(call, 1), call, 1, ShardParallel(), cluster, rule_table())[1]


def model(name: str, cluster: str, **options: Any) -> PlanningInputs:
    setup = build(name, **options)
    return prepared(
        setup.step, setup.state_shapes(), setup.batch_shapes(16), Cluster.parse(cluster)
    )


def objective_s(inputs: PlanningInputs, shape: Sequence[int]) -> float:
    mesh = Mesh(tuple(zip(("x0", "x1"), shape, strict=False)))
    found = solve_on_mesh(inputs, mesh, 60.0)
    assert found.solution.status == "optimal"
    return found.solution.objective_s


def unshared(inputs: PlanningInputs) -> PlanningInputs:
    """Every node decides alone."""
    alone = tuple(range(len(inputs.contraction.nodes)))
    return replace(inputs, classes=alone, work=count_work(inputs.contraction, alone))


def classes_by_input(inputs: PlanningInputs) -> Mapping[str, int]:
    c = inputs.contraction
    return {name: inputs.classes[c.node_of[op]] for name, op in c.input_links().items()}


@pytest.mark.parametrize(
    ("name", "cluster", "shape"),
    [
        ("gpt-test", "cpu:8", (8,)),
        ("gpt-test", "cpu:8", (2, 4)),
        ("gpt-125m", "h100:2x4", (2, 4)),
        ("llama-test", "cpu:8", (8,)),
    ],
)
def test_sharing_does_not_change_the_optimum_of_equal_layers(
    name: str, cluster: str, shape: tuple[int, ...]
) -> None:
    inputs = model(name, cluster, num_layers=4)
    alone = objective_s(unshared(inputs), shape)
    shared = objective_s(inputs, shape)
    # Sharing only takes choices away; of equal layers the best choices are equal.
    assert alone * (1 - 1e-9) <= shared <= alone * (1 + 1e-9)


@pytest.mark.parametrize("num_layers", [4, 6])
def test_sharing_leaves_dense_layers_the_freedom_to_alternate(num_layers: int) -> None:
    """Column and row splits in turn (acceptance case A2) need pairs of layers to share, in the
    backward pass as in the forward pass."""
    case = mlp(num_layers, 32, 256)
    inputs = prepared(case.step, case.state, case.batch, four_devices())
    shared, alone = objective_s(inputs, (4,)), objective_s(unshared(inputs), (4,))
    assert shared == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("name", ["gpt-test", "llama-test"])
def test_more_layers_do_not_make_more_classes(name: str) -> None:
    few, many = (model(name, "cpu:8", num_layers=n) for n in (6, 9))
    assert max(few.classes) == max(many.classes)
    assert len(many.contraction.nodes) > len(few.contraction.nodes)


def test_middle_layers_share_all_their_state() -> None:
    """Parameters, and the optimizer state that updates them; first and last layer may differ."""
    found = classes_by_input(model("gpt-test", "cpu:8", num_layers=6))
    second = {n: c for n, c in found.items() if "layer_2." in n}
    assert len(second) > 3 * 10
    for name, cls in second.items():
        assert found[name.replace("layer_2.", "layer_3.")] == cls, name
    parameters = {c for n, c in second.items() if ".params." in n and "opt_state" not in n}
    assert len(parameters) == len([n for n in second if ".params." in n and "opt_state" not in n])


def test_members_of_a_class_have_the_same_choices() -> None:
    inputs = model("gpt-test", "cpu:8", num_layers=4)
    c = inputs.contraction
    kinds: dict[int, set[Any]] = defaultdict(set)
    for node in c.nodes:
        ops = tuple((c.ops[o].name, c.ops[o].phase, c.ops[o].weight) for o in node.ops)
        kinds[inputs.classes[node.id]].add((node.factors, node.can_be_partial, ops))
    assert all(len(each) == 1 for each in kinds.values())


def test_classes_are_numbered_by_their_first_node() -> None:
    classes = model("gpt-test", "cpu:8").classes
    firsts = list(dict.fromkeys(classes))
    assert firsts == list(range(len(firsts)))


def test_inputs_with_different_marks_never_share() -> None:
    """A pin of one layer must not bind the others."""
    inputs = model("gpt-test", "cpu:8", num_layers=6)
    c = inputs.contraction
    kernel = "state.params.layer_{}.attention.out.kernel"
    links = c.input_links()
    marked = share_classes(c, {kernel.format(3): "pinned"})
    cls = {i: marked[c.node_of[links[kernel.format(i)]]] for i in (2, 3, 4)}
    assert cls[3] not in (cls[2], cls[4])
    assert len(set(marked)) > len(set(inputs.classes))
