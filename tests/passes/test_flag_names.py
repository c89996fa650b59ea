"""Plans in the terms of others: hand-written plans, whose flags follow from the flags' meaning."""

from dataclasses import replace

import pytest

from alpa_lite.cost_model import Cluster
from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.flag_names import (
    AXES,
    axis_sizes,
    kind_of_axis,
    maxtext_flags,
    megatron_flags,
    split_by_host,
)
from alpa_lite.passes.plan import Collective
from tests.passes.test_pipeline_timeline import planned
from tests.passes.test_plan_text import PLAN

SPLIT = ShardingSpec((("dp",), ()))
WHOLE = ShardingSpec(((), ()))


def plan(axes, cluster="h100:2x8", inputs=None, collectives=(), **options):
    options = {"num_microbatches": 1, "configuration": {"batch_size": 64}} | options
    predicted = replace(PLAN.predicted, collectives=collectives)
    return replace(
        PLAN, cluster=Cluster.parse(cluster), mesh=Mesh(tuple(axes.items())), inputs=inputs or {},
        predicted=predicted, **options,
    )  # fmt: skip


def test_axes():
    assert [axis.name for axis in AXES] == ["pp", "dp", "fsdp", "tp", "sp", "ep", "cp"]
    assert [kind_of_axis(n) for n in ("tp", "tp2", "dp3", "x0", "rows")] == [
        "tp", "tp", "dp", None, None,
    ]  # fmt: skip
    assert axis_sizes(plan({"dp": 2, "tp": 4, "tp2": 2}))["tp"] == 8


@pytest.mark.parametrize(
    ("axes", "within", "between"),
    [
        ({"dp": 2, "tp": 8}, {"dp": 1, "tp": 8}, {"dp": 2, "tp": 1}),
        ({"dp": 4, "tp": 4}, {"dp": 2, "tp": 4}, {"dp": 2, "tp": 1}),
        ({"fsdp": 16}, {"fsdp": 8}, {"fsdp": 2}),
        ({"tp": 16}, {"tp": 8}, {"tp": 2}),
    ],
)
def test_axes_within_and_between_hosts(axes, within, between):
    assert split_by_host(plan(axes), Cluster.parse("h100:2x8")) == (within, between)


def test_megatron():
    inputs = {"state.params.w": WHOLE, "state.opt_state.mu.w": SPLIT}
    scattered = (
        Collective(kind="reduce_scatter", axes=("tp",), bytes_per_step=1, times_per_step=1,
                   seconds_per_step=1),
    )  # fmt: skip
    found = megatron_flags(
        plan({"dp": 2, "tp": 8}, inputs=inputs, collectives=scattered, num_microbatches=4)
    )
    assert found.flags == (
        ("--tensor-model-parallel-size", "8"), ("--pipeline-model-parallel-size", "1"),
        ("--use-distributed-optimizer", ""), ("--sequence-parallel", ""),
        ("--micro-batch-size", "8"), ("--global-batch-size", "64"),
    )  # fmt: skip
    whole = megatron_flags(plan({"dp": 2, "tp": 8}, inputs=inputs | {"state.params.w": SPLIT}))
    assert "--use-distributed-optimizer" not in dict(whole.flags)
    assert "--sequence-parallel" not in dict(whole.flags)
    sharded = dict(megatron_flags(plan({"fsdp": 16})).flags)
    assert sharded["--data-parallel-sharding-strategy"] == "optim_grads_params"
    assert sharded["--micro-batch-size"] == "4"
    others = dict(megatron_flags(plan({"cp": 2, "ep": 8})).flags)
    assert others["--context-parallel-size"] == "2"
    assert others["--expert-model-parallel-size"] == "8"


def test_maxtext():
    found = maxtext_flags(plan({"fsdp": 4, "tp": 4}, num_microbatches=2))
    assert found.flags == (
        ("dcn_fsdp_parallelism", "2"), ("ici_fsdp_parallelism", "2"),
        ("ici_tensor_parallelism", "4"), ("per_device_batch_size", "2"),
        ("gradient_accumulation_steps", "2"),
    )  # fmt: skip


def test_what_has_no_counterpart_is_said():
    remarks = " ".join(megatron_flags(plan({"rows": 2, "sp": 8})).remarks)
    assert "no counterpart for mesh axes rows" in remarks and "along sp" in remarks


def test_pipelines():
    staged = replace(planned("zb-h1").plan, configuration={"batch_size": 16})
    found = megatron_flags(staged)
    assert dict(found.flags)["--pipeline-model-parallel-size"] == "2"
    assert dict(found.flags)["--micro-batch-size"] == "4"
    assert any("schedule zb-h1" in text for text in found.remarks)
    settings = dict(maxtext_flags(staged).flags)
    assert settings["ici_pipeline_parallelism"] == "2"
    assert settings["num_pipeline_microbatches"] == "4"
    assert settings["num_layers_per_pipeline_stage"] == "2"
    stages = tuple(replace(s, remat="full") for s in staged.stages)
    recomputed = dict(megatron_flags(replace(staged, stages=stages)).flags)
    assert recomputed["--recompute-granularity"] == "full"
    assert "schedule" not in " ".join(megatron_flags(replace(staged, schedule="1f1b")).remarks)
