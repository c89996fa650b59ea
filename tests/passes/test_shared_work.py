"""Work that planning does once for equal parts gives what doing it for each part gives."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from alpa_lite import AutoParallel
from alpa_lite.cost_model import Cluster, MeshCostModel
from alpa_lite.ir.sharding import Mesh
from alpa_lite.models import build
from alpa_lite.passes.build import PlanningInputs, class_strategies
from alpa_lite.passes.decision_graph import NONE, Contraction
from alpa_lite.passes.decisions import decide
from alpa_lite.passes.methods import batch_factors
from alpa_lite.passes.pipeline import StepArgs, prepare, trace_call
from alpa_lite.passes.pricing import price, resolved_axes, use_work
from alpa_lite.passes.reshard import COLLECTIVES, plan_reshard
from alpa_lite.passes.rules import RuleTable
from alpa_lite.passes.strategies import StrategySet, layout_spec

MESH = Mesh((("a", 2), ("b", 4)))
CLUSTER = Cluster.parse("h100:2x4")


@pytest.fixture(scope="module")
def inputs() -> PlanningInputs:
    setup = build("moe-test")
    call = StepArgs(
        fun=setup.step, args=(setup.state_shapes(), setup.batch_shapes(16)),
        arg_names=("state", "batch"), batch_argnums=(1,), donate_argnums=(0,), name="moe",
    )  # fmt: skip
    return prepare(trace_call(call, 1), call, 1, AutoParallel(), CLUSTER, RuleTable())[1]


@pytest.fixture(scope="module")
def strategies(inputs: PlanningInputs) -> tuple[StrategySet, ...]:
    return class_strategies(inputs.contraction, inputs.classes, MESH)


def test_specs_and_divisors_of_strategies(inputs, strategies):
    c = inputs.contraction
    partial = False
    for op in c.ops:
        found = strategies[inputs.classes[c.node_of[op.id]]]
        for layout in {*c.operand_layouts[op.id], *c.result_layouts[op.id]}:
            each = [layout_spec(layout, a, MESH.names) for a in found.assignments]
            assert found.specs(MESH, layout) == each
            expected = [
                math.prod(
                    n for f, n in zip(a, MESH.shape, strict=True) if f in layout.dims and f >= 0
                )
                for a in found.assignments
            ]
            assert found.divisors(MESH, layout.dims).tolist() == expected
            partial |= any(spec.partial for spec in each)
    assert partial  # pending sums were among them


def test_specs_of_decisions(inputs, strategies):
    c = inputs.contraction
    rng = random.Random(0)
    chosen = [rng.choice(s.assignments) for s in strategies]
    decisions = decide(c, MESH, [chosen[inputs.classes[n.id]] for n in c.nodes])
    for op in c.ops:
        own = chosen[inputs.classes[c.node_of[op.id]]]
        ins, outs = c.operand_layouts[op.id], c.result_layouts[op.id]
        assert decisions.operand_specs[op.id] == tuple(layout_spec(x, own, MESH.names) for x in ins)
        assert decisions.result_specs[op.id] == tuple(layout_spec(x, own, MESH.names) for x in outs)
        sums = tuple((resolved_axes(x, own, MESH), x.combine) for x in outs)
        assert decisions.resolved[op.id] == sums


def test_prices_of_pairs(inputs, strategies):
    """Edges cost what their layout changes cost one by one."""
    c = inputs.contraction
    prices = MeshCostModel(CLUSTER, MESH.axes)
    priced = price(inputs.work, strategies, MESH, prices)
    rng = random.Random(0)
    choice = [rng.randrange(len(s)) for s in strategies]
    expected: dict[tuple[int, int], float] = dict.fromkeys(priced.edge_cost_s, 0.0)
    for op, position in c.uses:
        use = use_work(c, inputs.classes, op, position)
        if use.u == use.v:
            continue
        source = layout_spec(use.source, strategies[use.u].assignments[choice[use.u]], MESH.names)
        target = layout_spec(use.target, strategies[use.v].assignments[choice[use.v]], MESH.names)
        seconds = use.weight * sum(
            prices.collective_s(step.kind, step.payload_fraction * use.num_bytes, step.axes)
            for step in plan_reshard(source, target, MESH)
            if step.kind in COLLECTIVES
        )
        pair = (min(use.u, use.v), max(use.u, use.v))
        expected[pair] = expected.get(pair, 0.0) + seconds
    assert any(expected.values())
    for (u, v), seconds in expected.items():
        table = priced.edge_cost_s.get((u, v))
        found = 0.0 if table is None else table[choice[u], choice[v]]
        np.testing.assert_allclose(found, seconds, rtol=1e-12)


def test_batch_factors_follow_the_batch_through_all_ops(inputs):
    """Repeated sweeps over all ops find the same."""
    c: Contraction = inputs.contraction
    found: list[set[int]] = [set() for _ in c.nodes]
    for op in c.ops:
        if op.kind == "batch":
            found[c.node_of[op.id]].add(c.result_layouts[op.id][0].dims[0])
    before = -1
    while before != sum(map(len, found)):
        before = sum(map(len, found))
        for op in c.ops:
            for value, layout in zip(c.operands[op.id], c.operand_layouts[op.id], strict=True):
                producer = c.ops[c.definition[value]]
                made = c.result_layouts[producer.id][producer.results.index(value)]
                for a, b in zip(made.dims, layout.dims, strict=True):
                    if a in found[c.node_of[producer.id]] and NONE not in (a, b):
                        found[c.node_of[op.id]].add(b)
    assert sum(map(bool, found)) > len(found) // 4
    assert batch_factors(c) == [frozenset(f) for f in found]


def test_uses_are_the_first_of_each_kind(inputs):
    c = inputs.contraction
    keys = [c.use_key(op.id, position) for op, position in c.uses]
    every = [c.use_key(op.id, i) for op in c.ops for i in range(len(c.operands[op.id]))]
    assert keys == list(dict.fromkeys(every))
    assert len(keys) < len(every)


def test_equal_ops_of_a_program_have_one_key(inputs):
    ops = [op for op in inputs.contraction.program.ops if op.kind == "op"]
    keys = {op.key for op in ops}
    assert len({id(op.key) for op in ops}) == len(keys) < len(ops)
    assert all(op.key.startswith(f"{op.name}[") for op in ops)
    assert {op.key for op in inputs.contraction.ops if op.kind != "op"} == {""}
