"""`Plan.describe`, in full for a plan written by hand, and the parts it is made of."""

import dataclasses

import pytest

from alpa_lite.cost_model import Cluster
from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.memory import CATEGORIES
from alpa_lite.passes.plan import Alternative, Collective, Decision, Plan, Predicted, SolveReport
from alpa_lite.passes.plan_text import (
    collapse_paths,
    layout_rows,
    printable,
)

COLUMNS = ShardingSpec(((), ("tp",)))
WHOLE = ShardingSpec(((), ()))
BATCH = ShardingSpec((("dp",), ()))

PLAN = Plan(
    name="lm",
    method="AutoParallel()",
    cluster=Cluster.parse("h100:1x8"),
    mesh=Mesh((("dp", 2), ("tp", 4))),
    graph_hash="0",
    num_microbatches=2,
    memory_budget_bytes=70 * 2**30,
    inputs={
        **{f"state.params.Block_{i}.Dense_0.kernel": COLUMNS for i in range(24)},
        **{f"state.params.Block_{i}.Dense_1.kernel": WHOLE for i in range(24)},
        "batch.tokens": BATCH,
    },
    decisions=(
        Decision(name="a", count=30, factors={"i": 8}, axes={"dp": "i", "tp": "partial"}),
        Decision(name="b", count=10, factors={"i": 8}, axes={"tp": "i"}),
    ),
    predicted=Predicted(
        step_s=0.25,
        compute_s=0.2,
        communication_s=0.05,
        memory_bytes=dict(zip(CATEGORIES, (2**30, 2**29, 2**30, 2**30, 2**29), strict=True)),
        peak_bytes=2**32,
        peak_at="backward, at Block_3",
        collectives=(
            Collective(
                kind="all_reduce", axes=("dp", "tp"), bytes_per_step=2**20, times_per_step=48,
                seconds_per_step=0.05,
            ),
        ),
    ),
    solve=SolveReport(
        status="within_gap", objective_s=0.25, lower_bound_s=0.249, gap=0.004, solver="milp",
        wall_s=3.21, num_decisions=2, num_strategies=20,
    ),
    alternatives=(
        Alternative(mesh=(8,), num_microbatches=1, step_s=None, reason="3 GiB short. " + 90 * "y"),
        Alternative(mesh=(2, 4), num_microbatches=2, step_s=0.25),
    ),
    notes=("op.cumsum is replicated",),
    versions={"jax": "0.10.2"},
    pins={"batch.tokens": "PartitionSpec('dp',)"},
)  # fmt: skip

TEXT = """\
lm on h100:1x8
  method          AutoParallel()
  mesh            dp=2, tp=4 (8 devices)
  microbatches    2
  predicted step  250 ms = 200 ms compute + 50 ms communication, no overlap assumed
  peak memory     4 GiB per device, budget 70 GiB
  solver          within_gap, gap 0.40% (milp, 2 decisions with 20 strategies, 3.21 s)
  pinned inputs   1
  made with       jax 0.10.2

Mesh axes
  dp  splits 30 of 40 groups of operations
  tp  splits 10 of 40 groups of operations, keeps 30 as pending sums

Memory per device at its peak (backward, at Block_3)
  parameters         1 GiB   25%
  gradients        512 MiB   12%
  optimizer state    1 GiB   25%
  activations        1 GiB   25%
  temporaries      512 MiB   12%
  all                4 GiB  100%

Collectives per step and device
  kind        axes   times  bytes   time
  all_reduce  dp+tp     48  1 MiB  50 ms

Inputs, and the mesh axes that split each dim
  state.params.Block_{0..23}.Dense_0.kernel  [-, tp]
  state.params.Block_{0..23}.Dense_1.kernel  [-, -]
  batch.tokens                               [dp, -]

Tried
  mesh  microbatches    step
  8                1       -  3 GiB short. ...
  2x4              2  250 ms  chosen

Notes
  -  op.cumsum is replicated"""


def test_describe():
    assert PLAN.describe() == TEXT


def test_describe_leaves_empty_sections_out():
    bare = dataclasses.replace(
        PLAN, alternatives=(), notes=(), pins={}, versions={}, decisions=(),
        predicted=dataclasses.replace(PLAN.predicted, collectives=()),
    )  # fmt: skip
    titles = [section.splitlines()[0] for section in bare.describe().split("\n\n")]
    assert titles == [
        "lm on h100:1x8",
        "Mesh axes",
        "Memory per device at its peak (backward, at Block_3)",
        "Inputs, and the mesh axes that split each dim",
    ]


def test_a_layer_with_another_layout_stays_apart():
    inputs = {f"w.layer_{i}": WHOLE if i == 2 else COLUMNS for i in range(6)}
    assert layout_rows(inputs) == [("w.layer_{0,1,3..5}", "[-, tp]"), ("w.layer_2", "[-, -]")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["a"], ["a"]),
        (["x_0", "x_1"], ["x_{0,1}"]),
        (["x_2", "x_0", "x_1"], ["x_{0..2}"]),
        (["x_8", "x_9", "x_10"], ["x_{8..10}"]),
        (["m.0.a", "m.0.b"], ["m.0.{a,b}"]),
        (["m.a.k", "m.b.k", "n.a.k", "n.b.k"], ["{m,n}.{a,b}.k"]),
        # Not a product of choices: nothing is claimed that is not there.
        (["s_0.b_0", "s_0.b_1", "s_1.b_0"], ["s_0.b_{0,1}", "s_1.b_0"]),
        (["s_0_b_0", "s_0_b_1", "s_1_b_0", "s_1_b_1"], ["s_{0,1}_b_{0,1}"]),
        (["x_01", "x_1"], ["x_{01,1}"]),
        (["a.b", "a.b.c"], ["a.b", "a.b.c"]),
        (["x_" + 30 * "9", "x_1"], ["{x_" + 30 * "9" + ",x_1}"]),
    ],
)
def test_collapse_paths(names, expected):
    assert list(collapse_paths(names).values()) == expected


def test_printable():
    assert printable("Grüße [tp]") == "Grüße [tp]"
    assert printable("a\x1b[1m\n\u202e") == "a\\x1b[1m\\n\\u202e"
