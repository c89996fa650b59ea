"""Plan files: what is saved is what is loaded, and nothing else passes for a plan."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import alpa_lite
from alpa_lite.errors import InfeasibleError, PlanError
from alpa_lite.passes.plan import Plan

Keys = tuple[str | int, ...]

W = jax.ShapeDtypeStruct((8, 4), jnp.float32)
X = jax.ShapeDtypeStruct((16, 8), jnp.float32)


def linear_step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
    return w - 0.1 * gradient, loss


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A searched plan with an alternative that did not fit and a note."""
    found = alpa_lite.parallelize(linear_step, cluster="a100-80:2x2").plan(W, X)
    more = replace(found.alternatives[0], step_s=None, reason="too large")
    return replace(found, alternatives=(*found.alternatives, more), notes=("a note",))


def valid_data() -> Any:
    """The JSON of a valid plan with two axes and collectives, a copy each time."""
    if not _VALID:
        found = alpa_lite.parallelize(
            linear_step, cluster="a100-80:2x2", method=alpa_lite.DataParallel(mesh_shape=(2, 2))
        ).plan(W, X)
        _VALID.append(replace(found, notes=("a note",)).to_json())
    return copy.deepcopy(_VALID[0])


_VALID: list[Any] = []


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


# Round trip.


def test_a_loaded_plan_equals_the_saved_one(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.to_json() == plan.to_json()
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "plan.json").read_text()


def test_two_plans_of_one_step_differ_only_in_wall_time(plan: Plan) -> None:
    again = alpa_lite.parallelize(linear_step, cluster="a100-80:2x2").plan(W, X)
    again = replace(again, alternatives=plan.alternatives, notes=plan.notes)
    solve = replace(again.solve, wall_s=plan.solve.wall_s)
    assert replace(again, solve=solve) == plan


def test_plans_do_not_depend_on_the_hash_seed(plan: Plan) -> None:
    """Another process, whose sets and dicts of strings iterate in another order, plans the same."""
    code = (
        "import json, alpa_lite\n"
        "from tests.passes.test_plan_files import W, X, linear_step\n"
        "found = alpa_lite.parallelize(linear_step, cluster='a100-80:2x2').plan(W, X)\n"
        "print(json.dumps(found.to_json()))\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found = Plan.from_json(json.loads(done.stdout))
    kept = {"solve": plan.solve, "alternatives": plan.alternatives, "notes": plan.notes}
    assert replace(found, **kept) == plan


def test_describe_names_mesh_memory_and_layouts() -> None:
    plan = Plan.from_json(valid_data())
    text = plan.describe()
    for name, size in plan.mesh.axes:
        assert name in text and str(size) in text
    for word in (plan.name, plan.cluster.name, "Memory", "parameters", "Collectives", "a note"):
        assert word in text
    for name in plan.inputs:
        assert name in text


def test_saving_replaces_the_file_as_a_whole(plan: Plan, tmp_path: Path) -> None:
    path = write(tmp_path / "plan.json", "old")
    plan.save(path)
    assert Plan.load(path) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_saved_plan_has_the_permissions_of_any_new_file(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    (tmp_path / "other").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("plan.json", "other")}
    assert len(modes) == 1


def test_a_failing_save_leaves_the_old_file_and_nothing_else(plan: Plan, tmp_path: Path) -> None:
    path = write(tmp_path / "plan.json", "old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(plan, memory_budget_bytes=math.nan).save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_save_that_cannot_replace_its_target_leaves_nothing(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        plan.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert not list((tmp_path / "folder").iterdir())


def test_saving_into_a_missing_folder_says_so(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plan.save(tmp_path / "nowhere" / "plan.json")


# Files that are no JSON.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not JSON .*truncated"),
        (b'{"format": "alpa-lite-plan", "ver', r"is not JSON .*truncated"),
        (b"\xff\xfe\x00", r"is not JSON .*utf-8"),
        (b"[" * 200_000, r"is not JSON .*recursion"),
        (b"1" * 5_000, r"is not JSON .*4300 digits"),
        (b"null", r"expected an object, found None"),
        (b"[]", r"expected an object, found \[\]"),
        (b'"plan"', r"expected an object, found 'plan'"),
        (b"{}", r"the field '\w+' is missing"),
    ],
)
def test_files_that_hold_no_object(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    text = json.dumps(valid_data())
    for length in range(0, len(text), 997):
        with pytest.raises(PlanError, match="is not JSON"):
            Plan.load(write(tmp_path / "plan.json", text[:length]))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no plan file at .*nothing\.json"):
        Plan.load(tmp_path / "nothing.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)


# Files broken by hand: every kind of field.

SOMEWHERE = r"plan\.json: "

BROKEN: list[tuple[Keys, Any, str]] = [
    (("format",), "other", r"format: expected one of \['alpa-lite-plan'\], found 'other'"),
    (("version",), 2, r"version 2 of the plan format; this alpa-lite reads version 1"),
    (("version",), "1", r"version '1' of the plan format"),
    (("name",), 3, r"name: expected text, found 3"),
    (("mesh",), {"x": 4}, r"mesh: expected a list, found \{'x': 4\}"),
    (("mesh", 0), ["x"], r"mesh\[0\]: expected a list of 2"),
    (("mesh", 0, 0), 1, r"mesh\[0\]\[0\]: expected text, found 1"),
    (("mesh", 0, 0), "a b", r"mesh axis names must be distinct identifiers"),
    (("mesh", 0, 1), 0, r"mesh\[0\]\[1\]: expected a whole number of at least 1, found 0"),
    (("mesh", 0, 1), 2.0, r"expected a whole number of at least 1, found 2\.0"),
    (("mesh", 0, 1), True, r"expected a whole number of at least 1, found True"),
    (("mesh",), [[f"x{i}", 1] for i in range(5)], r"has 5 axes; at most 4 are planned for"),
    (("mesh", 0, 1), 8, r"has 16 devices but cluster a100-80:2x2 has 4"),
    (("num_microbatches",), -1, r"num_microbatches: expected a whole number of at least 1"),
    (("num_microbatches",), None, r"num_microbatches: expected .*, found None"),
    (("memory_budget_bytes",), -1.0, r"expected a finite number of at least 0, found -1\.0"),
    (("memory_budget_bytes",), math.nan, r"expected a finite number of at least 0, found nan"),
    (("memory_budget_bytes",), math.inf, r"expected a finite number of at least 0, found inf"),
    (("memory_budget_bytes",), 10**400, r"expected a finite number of at least 0, found 10000"),
    (("graph_hash",), [], r"graph_hash: expected text, found \[\]"),
    (("predicted", "step_s"), "fast", r"predicted: step_s: expected a finite number"),
    (("predicted", "memory_bytes", "gradients"), -3, r"memory_bytes: gradients: expected"),
    (("predicted", "collectives", 0, "kind"), "gossip", r"collectives\[0\]: kind: expected one of"),
    (("predicted", "collectives", 0, "axes", 0), "z", r"collectives\[0\] uses mesh axis 'z'"),
    (("solve", "status"), "perfect", r"solve: status: expected one of"),
    (("solve", "num_decisions"), 1.5, r"num_decisions: expected a whole number"),
    (("inputs", "w"), "x", r"inputs: w: expected a list, found 'x'"),
    (("inputs", "w"), [["z"], []], r"inputs\['w'\] uses mesh axis 'z'"),
    (("inputs", "w"), [["dp"], ["dp"]], r"inputs\['w'\]: a mesh axis may be used once per array"),
    (("decisions", 0, "count"), 0, r"decisions\[0\]: count: expected a whole number of at least 1"),
    (("decisions", 0, "axes"), {"z": "a8"}, r"decisions\[0\] \(w\) uses mesh axis 'z'"),
    (("decisions", 0, "axes"), {"dp": "q9"}, r"splits 'q9' along 'dp'; it has \[.*\] or 'partial'"),
    (("decisions", 0, "factors", "a8"), "8", r"factors: a8: expected a whole number"),
    (("alternatives", 0, "step_s"), "?", r"alternatives\[0\]: step_s: expected a finite number"),
    (("alternatives", 0, "mesh"), 4, r"alternatives\[0\]: mesh: expected a list, found 4"),
    (("notes",), "a note", r"notes: expected a list, found 'a note'"),
    (("notes", 0), {}, r"notes\[0\]: expected text, found \{\}"),
    (("versions", "jax"), 1, r"versions: jax: expected text, found 1"),
    (("cluster",), None, r"cluster: found None, allowed an object"),
    (("cluster", "num_hosts"), "2", r"cluster\.num_hosts: found '2', allowed a whole number"),
    (("cluster", "device", "hbm_bytes"), -1, r"cluster\.device\.hbm_bytes: found -1"),
    (("cluster", "intra_host", "bytes_per_s"), math.nan, r"cluster\.intra_host\.bytes_per_s"),
]


@pytest.mark.parametrize(("keys", "value", "message"), BROKEN, ids=lambda x: str(x)[:40])
def test_a_broken_field_is_named(keys: Keys, value: Any, message: str, tmp_path: Path) -> None:
    data = valid_data()
    *path, last = keys
    holder(data, path)[last] = value
    with pytest.raises(PlanError, match=SOMEWHERE + "(.*: )?.*" + message):
        Plan.load(write(tmp_path / "plan.json", data))


def holder(data: Any, keys: list[str | int]) -> Any:
    for key in keys:
        data = data[key]
    return data


def objects(data: Any, keys: Keys = ()) -> Iterator[Keys]:
    """Where the JSON objects of a fixed shape are."""
    free = {"inputs", "pins", "factors", "axes", "versions", "configuration"}
    free |= {"flops_per_s", "provenance", "sources"}
    if isinstance(data, dict):
        if not keys or keys[-1] not in free:
            yield keys
        for key, item in data.items():
            yield from objects(item, (*keys, key))
    elif isinstance(data, list):
        for i, item in enumerate(data):
            yield from objects(item, (*keys, i))


def test_missing_and_unknown_fields_are_named_everywhere(tmp_path: Path) -> None:
    for keys in list(objects(valid_data())):
        data = valid_data()
        holder(data, list(keys))["surplus"] = 1
        with pytest.raises(PlanError, match="unknown field.*surplus|surplus.*unknown"):
            Plan.from_json(data, where="plan.json")
        for field in holder(valid_data(), list(keys)):
            data = valid_data()
            del holder(data, list(keys))[field]
            try:
                Plan.load(write(tmp_path / "plan.json", data))
            except PlanError as error:
                assert field in str(error)
            else:
                # Clusters have fields with defaults; plans have one, which came later.
                assert keys[:1] == ("cluster",) or field == "configuration", (keys, field)


def test_configuration_is_kept_and_checked(plan: Plan, tmp_path: Path) -> None:
    asked = {"target": "m", "batch_size": 8, "model.sizes": [1, 2], "model.remat": None}
    file = tmp_path / "plan.json"
    replace(plan, configuration=asked).save(file)
    assert Plan.load(file).configuration == asked
    for odd in ({"a": {}}, {"a": [[1]]}, {"a": 10**400}, []):
        data = plan.to_json() | {"configuration": odd}
        with pytest.raises(PlanError, match="configuration"):
            Plan.load(write(file, data))


# Files broken at random.

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["dp", "dp2", "a8", "b4", "partial", 10**400, 1e308, -0.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=400)
@given(st.data())
def test_random_edits_are_valid_plans_or_plan_errors(draw: st.DataObject) -> None:
    """One to three fields replaced, removed or added: a valid plan that saves and describes, or
    `PlanError`; nothing else escapes."""
    data: Any = valid_data()
    for _ in range(draw.draw(st.integers(1, 3), "edits")):
        at = data
        while isinstance(at, dict | list) and at:
            keys = sorted(at) if isinstance(at, dict) else range(len(at))
            key = draw.draw(st.sampled_from(list(keys)), "key")
            inner = at[key]
            if not (isinstance(inner, dict | list) and inner) or draw.draw(st.integers(0, 3)) == 0:
                break
            at = inner
        else:
            return
        action = draw.draw(st.sampled_from(["replace", "remove", "add"]), "action")
        if action == "remove":
            del at[key]
        elif action == "replace":
            at[key] = draw.draw(JSON, "value")
        elif isinstance(at, dict):
            at[draw.draw(st.text(max_size=3), "name")] = draw.draw(JSON, "value")
        else:
            at.append(draw.draw(JSON, "value"))
    try:
        plan = Plan.from_json(json.loads(json.dumps(data)))
    except PlanError as error:
        assert str(error).startswith(("plan: ", "cluster"))
        return
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.describe()


# Edits through the API.


def test_with_inputs_checks_what_it_is_given(plan: Plan) -> None:
    axis = plan.mesh.names[0]
    edited = plan.with_inputs({"w": [[axis], []]})
    assert edited.inputs["w"].dims == ((axis,), ()) and edited.inputs["x"] == plan.inputs["x"]
    with pytest.raises(PlanError, match="no input named 'v'"):
        plan.with_inputs({"v": [[], []]})
    with pytest.raises(PlanError, match=r"inputs\['w'\] uses mesh axis 'z'"):
        plan.with_inputs({"w": [["z"], []]})
    with pytest.raises(PlanError, match=r"inputs\['w'\]: a mesh axis may be used once"):
        plan.with_inputs({"w": [[axis], [axis]]})


def test_axes_of_one_dim_follow_the_order_of_the_mesh() -> None:
    method = alpa_lite.AutoParallel(mesh_shape={"dp": 2, "tp": 2})
    plan = alpa_lite.parallelize(linear_step, method=method, cluster="a100-80:2x2").plan(W, X)
    assert plan.with_inputs({"w": [["dp", "tp"], []]}).inputs["w"].dims == (("dp", "tp"), ())
    with pytest.raises(PlanError, match=r"inputs\['w'\] splits dim 0 .*: \['dp', 'tp'\]"):
        plan.with_inputs({"w": [["tp", "dp"], []]})


@pytest.mark.parametrize("spec", ["dp", ["dp"], None, [[1], []], 3])
def test_with_inputs_takes_axes_per_dim(plan: Plan, spec: Any) -> None:
    with pytest.raises(PlanError, match="must be a list of mesh axes for every dim"):
        plan.with_inputs({"w": spec})


def test_a_plan_is_not_written_into_a_folder_that_is_missing(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to write the plan p\.json"):
        plan.save(tmp_path / "nowhere" / "p.json")


# Edits, when the plan meets its step.


def reloaded(data: Any) -> Plan:
    """The plan as `parallelize` shows it after restoring it for its step."""
    return alpa_lite.parallelize(linear_step, plan=Plan.from_json(data)).plan(W, X)


def test_an_unedited_plan_is_restored_as_it_is(plan: Plan) -> None:
    assert reloaded(plan.to_json()) == plan


def test_inputs_win_over_decisions_and_the_plan_says_so(plan: Plan) -> None:
    data: Any = plan.to_json()
    index, record = next((i, d) for i, d in enumerate(data["decisions"]) if d["name"] == "w")
    other = next(f for f in record["factors"] if f not in record["axes"].values())
    data["decisions"][index]["axes"] = {plan.mesh.names[0]: other}
    found = reloaded(data)
    assert found.inputs == plan.inputs and found.decisions == plan.decisions
    assert "inputs win over the decisions of their nodes: w" in found.notes


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("memory_budget_bytes",), 1.0, r"needs .*, more than its memory_budget_bytes, 1 B"),
        (("pins",), {"nothing": "P('x')"}, r"pins\['nothing'\] is no input of the step"),
        (("decisions", 0, "count"), 7, r"says 7 nodes decide like .*; in the step there are 1"),
        (("num_microbatches",), 2, r"with 2 microbatches .* or num_microbatches differ"),
    ],
)
def test_edits_that_do_not_fit_the_step(plan: Plan, keys: Keys, value: Any, message: str) -> None:
    data: Any = plan.to_json()
    holder(data, list(keys[:-1]))[keys[-1]] = value
    with pytest.raises((PlanError, InfeasibleError), match=message):
        reloaded(data)
