"""What was asked for: read from plans, changed by dotted names, and never a way to run code."""

import json
from dataclasses import replace

import pytest
from jax.sharding import PartitionSpec as P

from alpa_lite.cli.configuration import Configuration, change_cluster, parse_pins, parse_spec
from alpa_lite.cli.exits import InputError
from alpa_lite.cli.options import MethodName
from alpa_lite.cost_model import Cluster
from alpa_lite.cost_model.checks import ClusterError
from alpa_lite.passes.methods import AutoParallel, ManualParallel
from alpa_lite.passes.pipeline_plan import load_plan

BASE = Configuration(target="mlp-test", cluster=Cluster.parse("h100:1x8"), batch_size=64)


@pytest.mark.parametrize("name", ["one", "staged"])
def test_a_plan_says_what_it_was_made_from(plan_files, name):
    plan = load_plan(plan_files[name])
    asked = Configuration.of_plan(plan)
    assert asked.target == "mlp-test" and asked.cluster == plan.cluster
    assert asked.model["hidden_size"] == 64  # settings that nobody has given are there too
    assert asked.to_json() == plan.configuration
    resolved, target = asked.load()
    assert resolved == asked
    assert target.batch_size == asked.batch_size


def test_every_field_survives_a_plan_file(plan_files):
    asked = replace(
        BASE, method=MethodName.SHARD, optimizer="sgd", mesh="dp=2,tp=4", num_microbatches="2",
        memory_budget="1GiB", model={"hidden_size": 32, "learning_rate": 0.5},
        pins={"state.*": 'P("tp")'},
    )  # fmt: skip
    plan = replace(load_plan(plan_files["one"]), configuration=asked.to_json())
    assert Configuration.of_plan(plan) == replace(asked, cluster=plan.cluster)


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("batch_size", 8, "batch_size", 8),
        ("method", "zero3", "method", MethodName.ZERO3),
        ("mesh", (2, 4), "mesh", "2,4"),
        ("num_microbatches", 4, "num_microbatches", "4"),
        ("memory_budget", "1GiB", "memory_budget", "1GiB"),
        ("memory_budget", None, "memory_budget", None),
        ("model.num_layers", 5, "model", {"num_layers": 5}),
        ("num_layers", 5, "model", {"num_layers": 5}),
    ],
)
def test_override(key, value, field, expected):
    changed = BASE.changed({key: value})
    assert getattr(changed, field) == expected
    assert replace(changed, **{field: getattr(BASE, field)}) == BASE


def test_fields_of_a_cluster_change_after_the_cluster():
    changed = BASE.changed({"cluster.hosts": 4, "cluster": "a100-80:2x4"}).cluster
    assert (changed.num_hosts, changed.devices_per_host) == (4, 4)
    assert changed.device == Cluster.parse("a100-80:2x4").device
    slower = change_cluster(changed, "cluster.inter_host.bytes_per_s", 1e9)
    assert slower.inter_host.bytes_per_s == 1e9
    assert replace(slower, inter_host=changed.inter_host) == changed
    other = change_cluster(changed, "cluster.device.flops_per_s.bfloat16", 1e15)
    assert other.device.peak_flops_per_s("bfloat16") == 1e15


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("batchsize.x", 8, "knows no 'batchsize.x'"),
        ("batch_size", "many", "positive whole number"),
        ("method", "zero4", "Did you mean 'zero3'"),
        ("target", "gpt-test", "cannot change the target"),
        ("pin.w", "P()", "--pin PATH=SPEC"),
        ("cluster.hots", 2, "Did you mean 'cluster.hosts'"),
        ("cluster.device", 2, "knows no 'cluster.device'"),
        ("cluster.device.hbm_bytes.x", 2, "knows no"),
    ],
)
def test_unknown_names_and_odd_values(key, value, expected):
    with pytest.raises(InputError, match=expected):
        BASE.changed({key: value})


def test_odd_figures_of_a_cluster_are_refused():
    with pytest.raises(ClusterError, match="hbm_bytes"):
        BASE.changed({"cluster.device.hbm_bytes": -1})
    with pytest.raises(ClusterError, match="num_hosts"):
        BASE.changed({"cluster.hosts": 0})


def test_code_named_in_a_file_is_not_run_unasked(plan_files):
    plan = replace(
        load_plan(plan_files["one"]), configuration={"target": "tests.cli.own_steps:crash"}
    )
    with pytest.raises(InputError, match="--target tests.cli.own_steps:crash"):
        Configuration.of_plan(plan)
    with pytest.raises(InputError, match="add --target"):
        Configuration.of_plan(plan, "tests.cli.own_steps:linear")
    assert Configuration.of_plan(plan, "tests.cli.own_steps:crash").target.endswith("crash")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "does not say what it was made from"),
        ({"target": 3}, "target: expected text"),
        ({"target": "m", "batch_size": "8"}, "batch_size: expected a positive whole number"),
        ({"target": "m", "mesh": 8}, "mesh: expected text"),
        ({"target": "m", "method": "best"}, "no method 'best'"),
        ({"target": "m", "speed": 1}, "no such field"),
        ({"target": "m", "pin.w": "exit()"}, "no layout such as"),
    ],
)
def test_odd_configurations_in_a_file(plan_files, data, expected):
    plan = replace(load_plan(plan_files["one"]), configuration=data)
    with pytest.raises(InputError, match=expected):
        Configuration.of_plan(plan)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("P()", P()),
        ('P(None, "tp")', P(None, "tp")),
        (" PartitionSpec(('dp', 'tp'), None) ", P(("dp", "tp"), None)),
    ],
)
def test_spec(text, expected):
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    "text", ["", "tp", "P(tp)", "P(1)", "P(*x)", "P(a='b')", "Q('tp')", "P((1,))", "P('a').b('c')"]
)
def test_not_a_spec(text):
    with pytest.raises(InputError, match="no layout"):
        parse_spec(text)


def test_pins():
    assert parse_pins(['a.*=P("x")', "b=P()"]) == {"a.*": 'P("x")', "b": "P()"}
    for odd in ("a", "=P()", 'a:P("x")'):
        with pytest.raises(InputError, match="PATH="):
            parse_pins([odd])


def test_method_with_pins():
    pinned = replace(BASE, mesh="dp=2,tp=4", pins={"state.*": 'P("tp")'})
    assert pinned.make_method() == ManualParallel(
        {"state.*": P("tp")}, mesh_shape={"dp": 2, "tp": 4}
    )
    assert isinstance(BASE.make_method(), AutoParallel)
    with pytest.raises(InputError, match="--mesh dp=2,tp=4"):
        replace(pinned, mesh="2,4").make_method()
    with pytest.raises(InputError, match="--pin is for"):
        replace(pinned, method=MethodName.DATA).make_method()


def test_pinned_plan(invoke):
    result = invoke(
        "plan", "mlp-test", "--cluster", "h100:8", "--batch-size", 64, "--mesh", "dp=2,tp=4",
        "--pin", 'state.params.layer_1.w=P(None,"tp")', "--set", "cluster.intra_host.bytes_per_s=1e9",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["inputs"]["state.params.layer_1.w"] == [[], ["tp"]]
    assert data["cluster"]["intra_host"]["bytes_per_s"] == 1e9
    assert data["configuration"]["pin.state.params.layer_1.w"] == 'P(None,"tp")'
