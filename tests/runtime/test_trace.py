"""Steps as Chrome traces."""

import gzip
import itertools
import json
from collections import defaultdict
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import alpa_lite
from alpa_lite.passes.pipeline_timeline import plan_timeline
from alpa_lite.passes.schedules import Task
from alpa_lite.runtime.timing import StepRecording, TimedInstruction
from alpa_lite.runtime.trace import plan_run, recorded_run, trace_json, write_trace

NUM_LAYERS = 4
WIDTH = 16

OTHER = ("update", "bubble")  # kinds of slices on a mesh's track that are no tasks
CATEGORIES = ("compute", "communication")  # kinds of slices of a plan without stages


def step(params, batch):
    def loss(params):
        x = batch
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    value, grads = jax.value_and_grad(loss)(params)
    return [w - 0.1 * g for w, g in zip(params, grads, strict=True)], value


def make_plan(schedule="1f1b"):
    method = alpa_lite.ManualPipeline(
        layers=[[0, 1], [2, 3]], submeshes=[(1, 1), (1, 1)], schedule=schedule,
        num_microbatches=4, layer_num=NUM_LAYERS,
    )  # fmt: skip
    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32")] * NUM_LAYERS
    parallel = alpa_lite.parallelize(step, method=method, cluster="h100:1x2")
    return parallel.plan(weights, jax.ShapeDtypeStruct((16, WIDTH), "float32"))


@pytest.fixture(scope="module")
def plan():
    return make_plan()


def recording_of(plan):
    """A recording that has each task for a millisecond, all meshes in step."""
    found = []
    for mesh, tasks in enumerate(plan_timeline(plan).schedule.tasks):
        for i, task in enumerate(tasks):
            found.append(
                TimedInstruction(
                    name=str(task), kind=task.kind, mesh=mesh, target=None, task=task,
                    start_s=1e-3 * i, end_s=1e-3 * (i + 1), dispatch_s=0.0,
                )
            )  # fmt: skip
    return StepRecording(tuple(found), (((0.0, 8), (1e-3, 16)),) * 2, 8e-3)


def check_schema(data):
    """What the viewers rely on; returns slices by (process, track), and times of the curves."""
    assert set(data) == {"traceEvents", "displayTimeUnit"}
    tracks = defaultdict(list)
    names, curves = {}, defaultdict(list)
    for event in data["traceEvents"]:
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            if event["name"] in ("process_name", "thread_name"):
                names[event["pid"], event.get("tid")] = event["args"]["name"]
        elif event["ph"] == "X":
            assert event["dur"] > 0 and event["ts"] >= 0 and event["name"] and event["cat"]
            tracks[event["pid"], event["tid"]].append(event)
        else:
            assert event["ph"] == "C"
            assert event["args"]["bytes"] >= 0
            curves[event["pid"], event["name"]].append(event["ts"])
    for moments in curves.values():
        assert moments == sorted(moments)
    for slices in tracks.values():
        for a, b in itertools.pairwise(slices):
            assert a["ts"] + a["dur"] <= b["ts"] + 1e-6, "slices overlap or are out of order"
    assert set(tracks) <= set(names)
    return {(names[p, None], names[p, t]): slices for (p, t), slices in tracks.items()}, curves


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_simulated_beside_measured(plan, tmp_path, name):
    path = tmp_path / name
    write_trace(path, plan, recorded_run(recording_of(plan)))
    text = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    tracks, curves = check_schema(json.loads(text))
    assert {p for p, _ in tracks} == {"simulated", "measured"}
    assert len(curves) == 4  # two meshes of two runs
    for mesh in ("mesh 0", "mesh 1"):
        simulated, measured = (
            [s["name"] for s in tracks[run, mesh] if s["cat"] not in OTHER]
            for run in ("simulated", "measured")
        )
        assert simulated == measured != []
    assert [p for p in tmp_path.iterdir() if p != path] == []


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1", "chimera"])
def test_slices_are_the_timeline(schedule):
    plan = make_plan(schedule)
    timeline = plan_timeline(plan)
    tracks, _ = check_schema(trace_json([plan_run(plan)]))
    for mesh, tasks in enumerate(timeline.schedule.tasks):
        slices = tracks["simulated", f"mesh {mesh}"]
        on_mesh = [s for s in slices if s["cat"] not in OTHER]
        assert [s["name"] for s in on_mesh] == [str(t) for t in tasks]
        assert sum(s["dur"] for s in on_mesh) == pytest.approx(
            1e6 * timeline.busy_s[mesh], rel=1e-2
        )
        assert sum(s["dur"] for s in slices) == pytest.approx(1e6 * plan.predicted.step_s, abs=1e-2)
    last = max(s["ts"] + s["dur"] for slices in tracks.values() for s in slices)
    assert last == pytest.approx(1e6 * timeline.step_s, rel=1e-3)
    sent = [s["name"] for s in tracks["simulated", "mesh 0 to mesh 1"]]
    assert "activation of microbatch 0 to stage 1" in sent


def test_sends_take_what_the_plan_says(plan):
    tracks, _ = check_schema(trace_json([plan_run(plan)]))
    for (source, target), seconds in {
        (0, 1): plan.stages[0].send_s, (1, 0): plan.stages[1].return_s,
    }.items():  # fmt: skip
        slices = tracks["simulated", f"mesh {source} to mesh {target}"]
        assert seconds > 0
        assert sum(s["dur"] for s in slices) == pytest.approx(
            1e6 * plan.num_microbatches * seconds, abs=1e-2
        )


def test_one_mesh():
    """A plan without stages: compute and collectives follow each other and add up to the step."""
    weights = [jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32")] * NUM_LAYERS
    method = alpa_lite.DataParallel()
    parallel = alpa_lite.parallelize(step, method=method, cluster="h100:1x2")
    plan = parallel.plan(weights, jax.ShapeDtypeStruct((16, WIDTH), "float32"))
    tracks, curves = check_schema(trace_json([plan_run(plan)]))
    slices = tracks["simulated", "mesh 0"]
    seconds = {cat: sum(s["dur"] for s in slices if s["cat"] == cat) / 1e6 for cat in CATEGORIES}
    predicted = plan.predicted
    assert predicted.communication_s > 0
    assert seconds["compute"] == pytest.approx(predicted.compute_s, abs=1e-9)
    assert seconds["communication"] == pytest.approx(predicted.communication_s, abs=1e-8)
    assert sum(s["dur"] for s in slices) == pytest.approx(1e6 * predicted.step_s, abs=1e-2)
    assert list(curves) == [(0, "bytes in use, mesh 0")]


def test_times_that_touch_do_not_overlap_after_rounding():
    third = 1e-3 / 3
    recording = StepRecording(
        tuple(
            TimedInstruction(
                name=str(i), kind="forward", mesh=0, target=None, task=Task("forward", 0, i),
                start_s=third * i, end_s=third * (i + 1), dispatch_s=0.0,
            )
            for i in range(200)
        ), (), 1.0,
    )  # fmt: skip
    (slices,) = check_schema(trace_json([recorded_run(recording)]))[0].values()
    assert len(slices) == 201 and slices[-1]["cat"] == "bubble"
    assert sum(s["dur"] for s in slices) == pytest.approx(1e6)


def test_what_takes_no_time_is_left_out(plan):
    run = plan_run(plan)
    first = replace(run.slices[0], end_s=run.slices[0].start_s)
    shortened = replace(run, slices=(first, *run.slices[1:]))
    tracks, _ = check_schema(trace_json([shortened]))
    assert first.name not in [s["name"] for s in tracks["simulated", "mesh 0"]]


def test_failed_write_leaves_nothing(plan, tmp_path):
    run = replace(plan_run(plan), memory=(((0.0, float("nan")),),))
    with pytest.raises(ValueError):  # noqa: PT011  (of json)
        write_trace(tmp_path / "trace.json", run)
    assert list(tmp_path.iterdir()) == []
