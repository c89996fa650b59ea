"""A step run as several programs by a host loop equals the step as one program, and undecorated.

Most cases are whole train steps: a pipeline with one stage. `stage_step` is what the stage of a
longer pipeline looks like: activations and cotangents come in, and go out for every microbatch.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_lite
from alpa_lite.ir.grad import GradSpec, value_and_grad_p
from alpa_lite.ir.graph import Op
from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.models import build
from alpa_lite.passes.compiler_merges import merged_collectives
from alpa_lite.passes.decisions import collectives
from alpa_lite.passes.microbatch import CONCATENATE
from alpa_lite.passes.pipeline import PlannedStep, StepArgs, plan_step
from alpa_lite.passes.reshard import plan_reshard
from alpa_lite.passes.rules import RuleTable
from alpa_lite.runtime.lower import device_mesh, lower_step
from alpa_lite.runtime.phase_cut import cut_phases
from alpa_lite.runtime.phases import PhaseProgram, PhasePrograms, compile_phases
from alpa_lite.runtime.reshard import spec_after
from alpa_lite.runtime.segments import Segment
from tests.runtime.phase_loop import GPIPE, ONE_F_ONE_B, HostLoop
from tests.runtime.random_plans import (
    MESH_SHAPES,
    assert_close,
    mesh_of,
    predicted_bytes,
    prepare_step,
    quick_compilation,
    random_decisions,
)
from tests.runtime.test_equivalence import fast_links
from tests.runtime.test_random_microbatches import arguments, expected, make_step

COUNT = 4
BATCH = 32
RULES = RuleTable()
# float32 sums in another order, see tests/runtime/random_plans.py; Adam amplifies, see
# tests/runtime/test_equivalence.py.
RTOL, RTOL_ADAM = 1e-4, 5e-3
# Of one plan, cut in two ways: XLA fuses differently.
RTOL_SAME = 2e-5


def plan(
    step: Any, args: Sequence[Any], method: Any = None, *, donate: Sequence[int] = (0,),
    batch: Sequence[int] = (1,),
) -> PlannedStep:  # fmt: skip
    call = StepArgs(
        fun=step, args=tuple(args), arg_names=("state", "batch", "other")[: len(args)],
        batch_argnums=tuple(batch), donate_argnums=tuple(donate), name="step",
    )  # fmt: skip
    method = method or alpa_lite.AutoParallel(mesh_shape=(2, 4), num_microbatches=COUNT)
    return plan_step(call, method, fast_links(), table=RULES)


def compiled(planned: PlannedStep, **options: Any) -> PhasePrograms:
    return compile_phases(planned, device_mesh(planned.decisions.mesh), **options)


def tree_of(planned: PlannedStep, outputs: Sequence[Any]) -> Any:
    return jax.tree.unflatten(planned.decisions.contraction.program.step.out_tree, outputs)


def one_program(planned: PlannedStep, args: Sequence[Any]) -> Any:
    leaves = jax.tree.leaves(args)
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    return lower_step(planned, avals, ()).run(leaves)


def microbatches(host: HostLoop, batch: Any) -> list[Any]:
    return [jax.tree.map(lambda x, m=m: host.microbatch(x, m), batch) for m in range(host.count)]


def mean_of_steps(step: Any, state: Any, batches: Sequence[Any]) -> Any:
    """Gradient accumulation for an update that is linear in the gradients: the steps' mean."""
    jitted = jax.jit(step)
    results = [jitted(state, batch) for batch in batches]
    return jax.tree.map(
        lambda *xs: xs[0] if not jnp.issubdtype(xs[0].dtype, jnp.floating) else sum(xs) / len(xs),
        *results,
    )


def assert_bytes(planned: PlannedStep, host: HostLoop) -> None:
    """Collectives of all programs, as often as each ran, are those of the plan.

    XLA merges collectives of equal values, if they are in one program.
    """
    most = predicted_bytes(planned.decisions)
    assert most
    ops = planned.decisions.contraction.ops
    rows = {e.value for e in host.parts.exits.values() if e.kind == CONCATENATE}
    for use in collectives(planned.decisions):
        if ops[use.op].kind == "output" and rows & {*ops[use.op].operands}:
            # The plan prices the way out of one microbatch's rows.
            most[use.kind, use.axes] += (host.count - 1) * use.times * use.payload_bytes
    least = dict(most)
    for use in merged_collectives(planned.decisions):
        least[use.kind, use.axes] -= use.times * use.payload_bytes
    found = host.bytes()
    assert found.keys() <= most.keys()
    for key, number in most.items():
        assert 0.99 * least[key] <= found.get(key, 0.0) <= 1.01 * number, key


def check(
    model: str, method: Any, *, rtol: float = RTOL, linear: bool = True, split: bool = False,
    quick: bool = True, **options: Any,
) -> HostLoop:  # fmt: skip
    """A model's step under a plan: against one program, and against one device.

    Args:
      model: a preset.
      method: how it is planned.
      rtol: allowed difference from one device.
      linear: whether the update is linear in the gradients; the reference then takes each
        microbatch by itself, else the whole batch at once.
      split: whether the backward pass is split.
      quick: compile without XLA's optimizations of the code of each device.
      **options: of the model.
    """
    setup = build(model, **{"optimizer": "sgd", **options})
    state = jax.jit(setup.init)(jax.random.key(7))
    batch = setup.make_batch(0, BATCH)
    planned = plan(setup.step, (state, batch), method)
    with quick_compilation(quick):
        host = HostLoop(planned, compiled(planned, split_backward=split))
        whole = one_program(planned, (state, batch))
    if linear:
        reference = mean_of_steps(setup.step, state, microbatches(host, batch))
    else:
        reference = jax.jit(setup.step)(state, batch)
    for order in (GPIPE, ONE_F_ONE_B):
        found = tree_of(planned, host.step(jax.tree.leaves((state, batch)), order))
        same = RTOL_SAME if linear else rtol
        assert_close(whole, found, tolerance=same, floor=1e-3, what=f"{order}, one program")
        if rtol:
            assert_close(reference, found, tolerance=rtol, floor=1e-3, what=order)
    if options.get("dtype") != "bfloat16":  # On CPUs XLA gathers some of its values as float32.
        assert_bytes(planned, host)
    return host


def auto(mesh: tuple[int, ...] = (2, 4)) -> Any:
    return alpa_lite.AutoParallel(mesh_shape=mesh, num_microbatches=COUNT)


def test_mlp() -> None:
    host = check("mlp-test", auto())
    names = [p.name for p in host.programs.programs]
    assert names == ["prepare", "forward", "backward", "update"]
    assert host.runs == {"prepare": 2, "forward": 8, "backward": 8, "update": 2}
    forward, backward = host.programs.loop
    for program in (forward, backward):
        assert_sums_in_place(program)
    # What is updated in place is the state, and nothing that somebody needs again.
    update = host.programs.update[0]
    assert {s.number for s in update.inputs if s.kind == "input"} == {
        update.inputs[i].number for i in update.donated if update.inputs[i].kind == "input"
    }
    made = {s for s in forward.outputs if s.kind == "stash"}
    assert made == {s for s in backward.inputs if s.kind == "stash"}
    assert host.programs.stash_bytes == (stash_bytes(forward), 0)


def stash_bytes(program: PhaseProgram) -> int:
    """Bytes per device of what a program leaves for later ones."""
    return sum(
        int(np.prod(sharding.shard_shape(aval.shape))) * aval.dtype.itemsize
        for slot, aval, sharding in zip(
            program.outputs, program.out_avals, program.out_shardings, strict=True
        )
        if slot.kind == "stash"
    )


def assert_sums_in_place(program: PhaseProgram) -> None:
    """Every sum over microbatches that a program adds to is the same buffer before and after."""
    text = program.compiled.as_text()
    (header,) = re.findall(r"input_output_alias=\{(.*?) \}", text)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", header)  # a single result has no number
    aliases = {int(a or 0): int(b) for a, b in pairs}
    sums = [(i, s) for i, s in enumerate(program.outputs) if s.kind == "accumulator"]
    assert sums
    for at, slot in sums:
        assert program.inputs[aliases[at]] == slot
        assert aliases[at] in program.donated


METHODS = {
    "auto-2x4": auto(),
    "auto-2x2x2": auto((2, 2, 2)),
    "zero2": alpa_lite.Zero2Parallel(mesh_shape=(8,), num_microbatches=COUNT),
    "zero3": alpa_lite.Zero3Parallel(mesh_shape=(8,), num_microbatches=COUNT),
    "zero3-2x4": alpa_lite.Zero3Parallel(mesh_shape=(2, 4), num_microbatches=COUNT),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method"),
    [
        *(("gpt-test", method) for method in METHODS),
        ("moe-test", "auto-2x4"), ("moe-test", "zero3-2x4"), ("llama-test", "auto-2x2x2"),
        ("llama-scan-test", "auto-2x4"), ("llama-scan-test", "zero2"),
        ("wide-resnet-test", "auto-2x4"), ("wide-resnet-test", "zero3"),
    ],
)  # fmt: skip
def test_models(model: str, method: str) -> None:
    check(model, METHODS[method])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method"), [("llama-test", "zero3"), ("llama-scan-test", "auto-2x4")]
)
def test_rematerialisation(model: str, method: str) -> None:
    check(model, METHODS[method], remat=True, split=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method"), [("gpt-test", "zero3"), ("llama-scan-test", "auto-2x4")]
)
def test_adamw(model: str, method: str) -> None:
    check(model, METHODS[method], rtol=RTOL_ADAM, linear=False, optimizer="adamw")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto-2x4", "zero3"])
def test_clip_by_global_norm(method: str) -> None:
    check("gpt-test", METHODS[method], linear=False, clip_norm=0.1)


@pytest.mark.slow
def test_bfloat16_compute_with_float32_state() -> None:
    # See tests/runtime/test_equivalence.py.
    check("gpt-test", auto(), rtol=2e-1, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto-2x2x2", "zero2"])
def test_dropout(method: str) -> None:
    # One device draws other masks for a microbatch: its key is not folded. One program does.
    check("gpt-test", METHODS[method], rtol=0, dropout_rate=0.1, split=True)


def test_dropout_keys_are_folded_in_each_program() -> None:
    """The same masks in forward and backward, other ones for each microbatch."""

    def step(state: Any, x: jax.Array) -> Any:
        w, key = state

        def loss_fn(w: jax.Array) -> jax.Array:
            kept = jax.random.bernoulli(key, 0.5, x.shape)
            return jnp.mean(jnp.tanh(jnp.where(kept, x, 0) @ w) ** 2)

        loss, grad = jax.value_and_grad(loss_fn)(w)
        return (w - grad, key), loss

    w, x = jax.random.normal(jax.random.key(0), (16, 8)), np.ones((BATCH, 16), np.float32)
    state = (w, jax.random.key(1))
    planned = plan(step, (state, x))
    with quick_compilation():
        host = HostLoop(planned, compiled(planned))
    (found, key), loss = tree_of(planned, host.step(jax.tree.leaves((state, x)), ONE_F_ONE_B))
    folded = [(w, jax.random.fold_in(state[1], m)) for m in range(COUNT)]
    jitted = jax.jit(step)
    results = [jitted(s, rows) for s, rows in zip(folded, microbatches(host, x), strict=True)]
    assert float(loss) == pytest.approx(float(sum(r[1] for r in results)) / COUNT, rel=RTOL)
    assert_close(sum(r[0][0] for r in results) / COUNT, found)
    # The key goes out as it came in: no program returns it.
    assert host.programs.passed == {1: 1}
    assert key.dtype == state[1].dtype


# Random layouts: pending sums and every kind of layout change cross from program to program.

QUICK = {((2, 4), 1, True)}
CASES = [
    pytest.param(mesh, seed, split, marks=() if (mesh, seed, split) in QUICK else pytest.mark.slow)
    for mesh in MESH_SHAPES
    for seed in range(4)
    for split in (False, True)
]


@functools.cache
def prepared() -> Any:
    return prepare_step(make_step(jax.random.normal), arguments(), num_microbatches=2)


@pytest.mark.parametrize(("mesh", "seed", "split"), CASES)
def test_random_layouts(mesh: tuple[int, ...], seed: int, split: bool) -> None:
    decisions = random_decisions(prepared(), mesh_of(mesh), seed)
    planned = PlannedStep(None, decisions, prepared().output_kinds)  # type: ignore[arg-type]
    with quick_compilation():
        host = HostLoop(planned, compiled(planned, split_backward=split))
    outputs = host.step(jax.tree.leaves(arguments()), ONE_F_ONE_B)
    assert_close(expected(2), tree_of(planned, outputs))


# A stage in the middle of a pipeline.

WIDTH = 16


def stage_step(state: Any, batch: Any) -> Any:
    """Two layers; `batch` has incoming activations and the cotangents of outgoing ones."""
    params, momentum = state

    def forward(w1: jax.Array, w2: jax.Array, x: jax.Array) -> list[jax.Array]:
        y = jnp.tanh(jnp.tanh(x @ w1) @ w2)
        return [y, jnp.mean(jnp.abs(y))]

    w1, w2 = params
    closed = jax.make_jaxpr(forward)(w1, w2, batch["x"])
    spec = GradSpec(closed, 0, (0, 1, 2), has_loss=False, seeded=(0,), num_accumulated=2)
    y, size, g1, g2, back = value_and_grad_p.bind(w1, w2, batch["x"], batch["ct"], spec=spec)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, (g1, g2))
    params = jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum)
    return (params, momentum), {"y": y, "back": back, "size": size}


def stage_arguments() -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    params = tuple(0.3 * jax.random.normal(k, (WIDTH, WIDTH)) for k in keys[:2])
    momentum = jax.tree.map(jnp.ones_like, params)
    rows = [np.asarray(jax.random.normal(k, (BATCH, WIDTH))) for k in keys[2:]]
    return (params, momentum), {"x": rows[0], "ct": rows[1]}


CT = 4  # position of the cotangents among the input leaves


@functools.cache
def planned_stage(count: int = COUNT) -> PlannedStep:
    method = alpa_lite.AutoParallel(mesh_shape=(2, 4), num_microbatches=count)
    return plan(stage_step, stage_arguments(), method)


def check_stage(host: HostLoop, order: str) -> None:
    state, batch = stage_arguments()
    step = jax.jit(stage_step)
    results = [step(state, part) for part in microbatches(host, batch)]
    mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *results)
    outputs = host.step(jax.tree.leaves((state, batch)), order, join=False)
    new, aux = tree_of(host.planned, [x if isinstance(x, jax.Array) else None for x in outputs])
    assert_close(mean[0], new)
    assert_close(mean[1]["size"], aux["size"])
    names = host.program.graph.output_names
    for name in ("y", "back"):
        at = next(i for i, n in enumerate(names) if n.endswith(name))
        rows = outputs[at] if host.count > 1 else [outputs[at]]
        assert_close([r[1][name] for r in results], rows)


def num_matmuls(program: PhaseProgram) -> int:
    return len(re.findall(r" dot\(|matmul", program.compiled.as_text()))


def test_stage() -> None:
    planned = planned_stage()
    with quick_compilation():
        host = HostLoop(planned, compiled(planned, late_inputs=(CT,)))
    forward = host.programs.loop[0]
    assert all((s.kind, s.number) != ("batch", CT) for s in forward.inputs)
    outputs = {(s.kind, host.program.graph.output_names[s.number]) for s in forward.outputs
               if s.kind == "loop_output"}  # fmt: skip
    assert [name.rpartition(".")[2] for _, name in outputs] == ["y"]
    for order in (GPIPE, ONE_F_ONE_B):
        check_stage(host, order)
    assert_bytes(planned, host)


def test_split_backward() -> None:
    planned = planned_stage()
    host = HostLoop(planned, compiled(planned, late_inputs=(CT,), split_backward=True))
    forward, first, second = host.programs.loop
    assert [p.name for p in (first, second)] == ["backward_input", "backward_weight"]
    assert [num_matmuls(p) for p in (forward, first, second)] == [2, 2, 2]
    assert {s.kind for s in first.outputs} == {"loop_output", "stash"}
    assert {s.kind for s in second.outputs} == {"accumulator"}
    assert_sums_in_place(second)
    held = host.programs.stash_bytes
    assert held[0] == stash_bytes(forward) and held[2] == 0
    check_stage(host, ONE_F_ONE_B)
    assert_bytes(planned, host)


def test_one_microbatch() -> None:
    planned = planned_stage(1)
    for split in (False, True):
        with quick_compilation():
            host = HostLoop(planned, compiled(planned, split_backward=split))
        assert host.programs.prepare is None
        # The update reads the gradients where the backward pass left them.
        assert any(s.kind == "stash" for s in host.programs.update[0].inputs)
        check_stage_of_one(host)


def check_stage_of_one(host: HostLoop) -> None:
    args = stage_arguments()
    outputs = host.step(jax.tree.leaves(args))
    assert_close(jax.jit(stage_step)(*args), tree_of(host.planned, outputs))


def test_forward_only() -> None:
    def step(params: Any, x: jax.Array) -> Any:
        return {"y": jnp.tanh(x @ params["w"]) @ params["v"], "x": x}

    params = {"w": np.ones((WIDTH, 32), np.float32), "v": np.full((32, WIDTH), 0.1, np.float32)}
    x = np.random.default_rng(0).standard_normal((BATCH, WIDTH)).astype(np.float32)
    method = alpa_lite.AutoParallel(mesh_shape=(2, 4), num_microbatches=1)
    planned = plan(step, (params, x), method, donate=())
    host = HostLoop(planned, compiled(planned))
    assert [p.name for p in host.programs.programs] == ["forward"]
    assert not host.programs.loop[0].donated
    assert host.programs.stash_bytes == (0,)
    assert_close(step(params, x), tree_of(planned, host.step(jax.tree.leaves((params, x)))))


# Rounds of the update.


def clipped_step(state: Any, batch: Any, norm: Any) -> Any:
    """A stage whose gradients are clipped by the norm over all stages, which comes in."""
    (w, v), count = state

    def loss_fn(w: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(batch @ w) @ v) ** 2)

    loss, (gw, gv) = jax.value_and_grad(loss_fn, argnums=(0, 1))(w, v)
    mine = jnp.sum(gw * gw) + jnp.sum(gv * gv)
    scale = 1.0 / jnp.maximum(1.0, jnp.sqrt(norm))
    return ((w - scale * gw, v - scale * gv), count + 1), {"loss": loss, "mine": mine}


@functools.cache
def planned_clip() -> PlannedStep:
    keys = jax.random.split(jax.random.key(0), 3)
    w, v = (jax.random.normal(k, (WIDTH, WIDTH)) for k in keys[:2])
    x = jax.random.normal(keys[2], (BATCH, WIDTH))
    return plan(clipped_step, (((w, v), jnp.int32(3)), x, jnp.float32(0)))


def clip_rounds(planned: PlannedStep) -> list[frozenset[int]]:
    """The update of `clipped_step`: what the incoming norm reaches is the second round."""
    graph = planned.decisions.contraction.program.graph
    reached, last = {graph.inputs[-1]}, graph.grad_regions[0].last_op
    for op in graph.ops[last:]:
        if reached & {*op.operand_ids}:
            reached |= {*op.results}
    second = frozenset(op.id for op in graph.ops[last:] if reached & {*op.results})
    return [frozenset(op.id for op in graph.ops[last:]) - second, second]


def test_update_in_rounds() -> None:
    planned = planned_clip()
    with quick_compilation():
        programs = compiled(planned, update_rounds=clip_rounds(planned))
    host = HostLoop(planned, programs)
    first, second = programs.update
    names = host.program.graph.output_names
    given = {names[s.number].rpartition(".")[2] for s in first.outputs if s.kind == "output"}
    assert {"loss", "mine"} <= given
    norm = 4
    assert not any(s.kind == "input" and s.number == norm for s in first.inputs)
    # Parameters are read, and donated, by the second round alone; so are the gradients' sums.
    assert {s.number for s in second.inputs if s.kind == "input"} >= {0, 1, norm}
    assert {second.inputs[i].number for i in second.donated} >= {0, 1}
    keys = jax.random.split(jax.random.key(0), 3)
    w, v = (jax.random.normal(k, (WIDTH, WIDTH)) for k in keys[:2])
    x = np.asarray(jax.random.normal(keys[2], (BATCH, WIDTH)))
    state = ((w, v), jnp.int32(3))

    def late(r: int, outputs: dict[int, Any]) -> dict[int, Any]:
        assert r == 1
        mine = next(outputs[i] for i, n in enumerate(names) if n.endswith("mine"))
        return {norm: 100.0 * np.asarray(mine)}

    leaves = [*jax.tree.leaves((state, x)), None]
    found = tree_of(planned, host.step(leaves, ONE_F_ONE_B, late))
    mine = jax.jit(clipped_step)(state, x, 0.0)[1]["mine"]
    assert_close(jax.jit(clipped_step)(state, x, 100.0 * mine), found)


def test_rounds_that_cannot_be() -> None:
    planned = planned_clip()
    first, second = clip_rounds(planned)
    with pytest.raises(ValueError, match="is in two rounds"):
        compiled(planned, update_rounds=[first | second, second])
    with pytest.raises(ValueError, match="is no op of the update"):
        compiled(planned, update_rounds=[first | {0}, second])
    last = {max(second)}
    with pytest.raises(ValueError, match="an op of the update reads"):
        compiled(planned, update_rounds=[first | last, second - last])


def test_ops_that_no_round_names_run_where_they_are_read() -> None:
    planned = planned_clip()
    first, second = clip_rounds(planned)
    cut = functools.partial(cut_phases, planned.decisions, planned.output_kinds)
    names = planned.decisions.contraction.program.graph.output_names

    def ops(segment: Segment) -> set[int]:
        return {item.id for item in segment.items if isinstance(item, Op)}

    # What only outputs read comes last; an empty round keeps its place.
    early, late = cut(update_rounds=[frozenset(), second]).update
    assert ops(early) == set()
    assert [names[i].rpartition(".")[2] for i in early.outputs] == ["loss"]
    assert ops(late) == first | second
    # What the first round reads runs in it.
    squares = {max(i for i in first if "mul" in op_name(planned, i))}
    sums = {i for i in first if op_name(planned, i) == "add"}
    early, late = cut(update_rounds=[sums, second]).update
    assert ops(early) > sums | squares
    assert ops(late) == second


def op_name(planned: PlannedStep, op: int) -> str:
    return planned.decisions.contraction.program.graph.ops[op].name


# What goes through a step as it is.


def test_outputs_that_are_inputs() -> None:
    """Only what changes is returned; a state leaf that also goes out as aux is a copy."""

    def step(state: Any, x: jax.Array) -> Any:
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(state["w"])
        new = {**state, "w": state["w"] - 0.1 * grad}
        return new, {"loss": loss, "seed": state["seed"], "old": state["w"], "x": x}

    state = {"w": np.ones((WIDTH, 8), np.float32), "seed": np.int32(3), "table": np.ones(8)}
    x = np.random.default_rng(0).standard_normal((BATCH, WIDTH)).astype(np.float32)
    planned = plan(step, (state, x))
    with quick_compilation():
        host = HostLoop(planned, compiled(planned))
    graph = host.program.graph
    passed = {graph.output_names[o]: graph.input_names[i] for o, i in host.programs.passed.items()}
    by_end = {k.rpartition(".")[2]: v.rpartition(".")[2] for k, v in passed.items()}
    # Whether the old weights go out as they lie depends on the plan.
    assert by_end.pop("old", "w") == "w"
    assert by_end == {"table": "table", "seed": "seed", "x": "batch"}
    found = tree_of(planned, host.step(jax.tree.leaves((state, x))))
    assert_close(jax.jit(step)(state, x), found)


def test_masks_and_broadcasts_are_made_again() -> None:
    """They cost less than to hold for every microbatch."""

    def step(w: Any, x: jax.Array) -> Any:
        def loss_fn(w: jax.Array) -> jax.Array:
            mask = jnp.tril(jnp.ones((WIDTH, WIDTH)))
            scores = jnp.einsum("btd,bsd->bts", x @ w, x)
            probs = jax.nn.softmax(jnp.where(mask > 0, scores, -1e9))
            return jnp.mean((probs @ x) ** 2)

        loss, grad = jax.value_and_grad(loss_fn)(w)
        return w - grad, loss

    w, x = np.eye(8, dtype=np.float32), np.ones((BATCH, WIDTH, 8), np.float32)
    x *= np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    planned = plan(step, (w, x))
    with quick_compilation():
        host = HostLoop(planned, compiled(planned))
    assert host.programs.prepare is not None
    assert (WIDTH, WIDTH) not in {a.shape[-2:] for a in host.programs.prepare.out_avals}
    held = [
        a.shape for s, a in zip(host.programs.loop[0].outputs, host.programs.loop[0].out_avals,
                                strict=True) if s.kind == "stash"
    ]  # fmt: skip
    assert held.count((BATCH // COUNT, WIDTH, WIDTH)) <= 2, held
    assert_close(jax.jit(step)(w, x), tree_of(planned, host.step([w, x])))


def test_other_mesh() -> None:
    planned = planned_clip()
    other = device_mesh(Mesh((("a", 2), ("b", 4))))
    with pytest.raises(ValueError, match="the devices of a plan form its mesh"):
        compile_phases(planned, other)


def test_layouts_after_steps() -> None:
    """`spec_after` follows every step that `plan_reshard` takes."""
    mesh = mesh_of((2, 2, 2))
    rng = np.random.default_rng(0)

    def draw() -> ShardingSpec:
        dims: list[list[str]] = [[], []]
        partial = []
        for axis in mesh.names:
            to = rng.integers(4)
            (dims[to] if to < 2 else partial if to == 2 else []).append(axis)
        return ShardingSpec(tuple(map(tuple, dims)), tuple(sorted(partial)))

    for _ in range(300):
        source, target = draw(), draw()
        spec = source
        for step in plan_reshard(source, target, mesh):
            spec = spec_after(spec, step)
        assert spec == target
