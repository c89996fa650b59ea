"""What differs between plans: each change planted by hand, and found with its figures."""

from dataclasses import replace

import pytest

from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.plan_diff import Change, describe_diff, diff_plans
from tests.passes.test_plan_text import BATCH, COLUMNS, PLAN, WHOLE


def found(**changes):
    return diff_plans(PLAN, replace(PLAN, **changes))


def test_equal_plans():
    assert diff_plans(PLAN, PLAN) == ()
    assert "the same" in describe_diff(())


def test_what_does_not_count():
    slower = replace(PLAN.solve, wall_s=100.0)
    assert found(name="other", versions={"jax": "9"}, solve=slower, notes=("x",)) == ()


def test_seconds_and_bytes():
    predicted = replace(PLAN.predicted, step_s=0.5, communication_s=0.3, peak_bytes=2.0**31)
    step, communication, peak = found(predicted=predicted)
    assert step == Change("seconds", "step", 0.25, 0.5, "s") and step.ratio == 2
    assert (communication.name, communication.ratio) == ("communication", pytest.approx(6))
    assert peak.to_json() == {
        "section": "bytes", "name": "peak per device", "before": 2**32, "after": 2**31,
        "unit": "bytes", "ratio": 0.5,
    }  # fmt: skip


def test_mesh_and_cluster():
    bigger = PLAN.cluster.resized(2, 8)
    changes = found(cluster=bigger, mesh=Mesh((("dp", 4), ("tp", 4))))
    assert [(c.name, c.before, c.after) for c in changes] == [
        ("name", "h100:1x8", "h100:2x8"),
        ("num_hosts", 1, 2),
        ("mesh", "dp=2, tp=4", "dp=4, tp=4"),
    ]
    assert [c.ratio for c in changes] == [None] * 3


def test_collectives_that_come_and_go():
    other = replace(PLAN.predicted.collectives[0], axes=("dp",))
    predicted = replace(PLAN.predicted, collectives=(other,))
    gone_s, gone_bytes, new_s, new_bytes = found(predicted=predicted)
    assert (gone_s.name, gone_s.before, gone_s.after) == (
        "all_reduce over dp+tp, time", 0.05, None,
    )  # fmt: skip
    assert (new_bytes.name, new_bytes.before, new_bytes.after, new_bytes.unit) == (
        "all_reduce over dp, bytes", None, 2**20, "bytes",
    )  # fmt: skip
    assert gone_bytes.ratio is None and new_s.ratio is None


def test_layouts_that_change_alike_are_one_line():
    inputs = {k: WHOLE if v == COLUMNS else v for k, v in PLAN.inputs.items()}
    changes = found(inputs=inputs | {"batch.tokens": ShardingSpec(((), ("dp",)))})
    assert len(changes) == 25 and {c.section for c in changes} == {"layouts"}
    assert describe_diff(changes).splitlines() == [
        "Layouts",
        "  state.params.Block_{0..23}.Dense_0.kernel  [-, tp]  -> [-, -]",
        "  batch.tokens                               [dp, -]  -> [-, dp]",
    ]
    assert PLAN.inputs["batch.tokens"] == BATCH


def test_configuration():
    old = replace(PLAN, configuration={"target": "a", "model.n": 2, "model.sizes": [1, 2]})
    new = replace(PLAN, configuration={"target": "a", "model.n": 3, "model.sizes": [1, 2]})
    assert diff_plans(old, new) == (Change("asked for", "model.n", 2, 3),)
