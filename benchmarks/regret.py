"""How far the chosen plan is from the best one, measured; and how well predictions rank plans.

    python -m benchmarks.regret [--quick] [--only gpt moe] [--cluster FILE]

On 8 virtual CPU devices: the cluster is calibrated, every model is planned by many methods and laid
out by hand in the usual ways, all losses are checked against one device, and all programs are timed
in turns. The models are the test presets, enlarged so that a step takes 20 to 200 ms.
Writes `results/regret.json` (a row per model) and `results/regret_plans.json` (a row per plan),
unless models were selected.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from alpa_lite.virtual_devices import configure_virtual_cpu_devices
from benchmarks.options import parse_options
from benchmarks.results_table import Column, ResultsTable, describe_environment

NUM_DEVICES = 8
ROUNDS = 20
QUICK_ROUNDS = 3
TIMED_STEPS = 2  # per turn, after one untimed step
LOSS_TOLERANCE = 1e-3  # relative: sums of float32 in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is trained.

    Attributes:
      name: shown in the table.
      preset: test preset.
      batch_size: global batch.
      overrides: configuration that makes a step long enough to measure.
    """

    name: str
    preset: str
    batch_size: int
    overrides: dict[str, Any] = field(default_factory=dict)


MODELS = (
    Model(
        name="gpt", preset="gpt-test", batch_size=16,
        overrides={"hidden_size": 256, "seq_len": 64, "vocab_size": 1024},
    ),
    Model(
        name="llama", preset="llama-test", batch_size=16,
        overrides={"hidden_size": 256, "mlp_size": 768, "seq_len": 64, "vocab_size": 1024},
    ),
    Model(
        name="moe", preset="moe-test", batch_size=16,
        overrides={"hidden_size": 256, "seq_len": 64, "vocab_size": 1024, "group_size": 64},
    ),
    Model(
        name="wide-resnet", preset="wide-resnet-test", batch_size=32,
        overrides={"base_channels": 16, "num_classes": 64, "image_size": 64},
    ),
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Program:
    """One compiled plan and its measurements.

    Attributes:
      name: of the plan.
      predicted_s: what the cost model expects, None for plans written by hand.
      detail: mesh and predicted parts, for the table.
      run: `run(state, batch) -> (state, metrics)`; donates the state.
      state, batch: laid out as `run` wants them; the state is replaced at every step.
      loss: of the first step.
      samples_s: measured seconds per step.
    """

    name: str
    predicted_s: float | None
    detail: dict[str, Any]
    run: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batch: Any
    loss: float = 0.0
    samples_s: list[float] = field(default_factory=list)

    @property
    def measured_s(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.samples_s)

    def step(self) -> float:
        """Seconds of one step, started and awaited."""
        import jax

        begun = time.perf_counter()
        self.state, metrics = self.run(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        seconds = time.perf_counter() - begun
        self.loss = float(metrics["loss"])
        return seconds


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b: 1 if both rank alike, -1 if in opposite order; nan without any order.

    Example:
      >>> kendall_tau([1, 2, 3, 4], [1, 2, 4, 3])
      0.6666666666666666
    """
    concordant = ties_a = ties_b = pairs = 0
    for (x1, y1), (x2, y2) in itertools.combinations(zip(a, b, strict=True), 2):
        dx, dy = (x1 > x2) - (x1 < x2), (y1 > y2) - (y1 < y2)
        pairs += 1
        concordant += dx * dy
        ties_a += dx == 0
        ties_b += dy == 0
    scale = ((pairs - ties_a) * (pairs - ties_b)) ** 0.5
    return concordant / scale if scale else float("nan")


def methods() -> list[tuple[str, Any]]:
    """(name, method) of every plan; the first is the one that `parallelize` takes by default."""
    import alpa_lite as al

    one_axis = [
        ("DataParallel", al.DataParallel),
        ("Zero1Parallel", al.Zero1Parallel),
        ("Zero2Parallel", al.Zero2Parallel),
        ("Zero3Parallel", al.Zero3Parallel),
    ]
    return [
        ("AutoParallel", al.AutoParallel()),
        *(
            (f"AutoParallel {'x'.join(map(str, mesh))}", al.AutoParallel(mesh_shape=mesh))
            for mesh in ((8,), (2, 4), (4, 2), (2, 2, 2))
        ),
        *((f"{name} 8", make(mesh_shape=(8,))) for name, make in one_axis),
        *((f"{name} 2x4", make(mesh_shape=(2, 4))) for name, make in one_axis),
    ]


def planned_programs(setup: Any, state: Any, batch: Any, cluster: Any) -> list[Program]:
    """Every method's plan, compiled; plans on 2x4 only if their price differs from that on 8."""
    import jax

    import alpa_lite

    programs: list[Program] = []
    for name, method in methods():
        step = alpa_lite.parallelize(setup.step, method=method, cluster=cluster)
        plan = step.plan(state, batch)
        p = plan.predicted
        base = name.removesuffix(" 2x4") + " 8"
        same = [q for q in programs if q.name == base and not name.startswith("Auto")]
        if same and abs((same[0].predicted_s or 0.0) / p.step_s - 1) < 1e-3:
            continue
        executable = step.compile(state, batch)
        leaves, tree = jax.tree.flatten((state, batch))
        placed = jax.tree.unflatten(
            tree, [_copy(x, s) for x, s in zip(leaves, executable.in_shardings, strict=True)]
        )
        detail = {
            "mesh": "x".join(map(str, plan.mesh.shape)),
            "compute_s": p.compute_s,
            "communication_s": p.communication_s,
        }
        programs.append(Program(name, p.step_s, detail, executable, *placed))
    return programs


def handwritten_programs(model: Model, setup: Any, state: Any, batch: Any) -> list[Program]:
    """The baselines, compiled."""
    import jax

    from benchmarks.baselines import CONV_CHANNELS, MEGATRON, baselines, compile_baseline

    patterns = CONV_CHANNELS if model.name == "wide-resnet" else MEGATRON
    programs = []
    for b in baselines(patterns, NUM_DEVICES):
        compiled, of_state, of_batch = compile_baseline(b, setup.step, state, batch)
        placed = jax.tree.map(_copy, (state, batch), (of_state, of_batch))
        detail = {"mesh": "x".join(map(str, b.mesh_axes.values()))}
        programs.append(Program(f"by hand: {b.name}", None, detail, compiled, *placed))
    return programs


def check_losses(programs: Sequence[Program], setup: Any, state: Any, batch: Any) -> None:
    """Run each program once and compare its loss with that of one device.

    Raises:
      AssertionError: a loss differs; nothing is measured then.
    """
    import jax

    expected = float(jax.jit(setup.step)(state, batch)[1]["loss"])
    for program in programs:
        program.step()
        wrong = abs(program.loss - expected) > LOSS_TOLERANCE * abs(expected)
        if wrong:
            raise AssertionError(f"{program.name}: loss {program.loss}, expected {expected}")


def measure(programs: Sequence[Program], rounds: int) -> None:
    """Time all programs in turns, in another order every round."""
    order = list(programs)
    shuffle = random.Random(0).shuffle
    for program in order:
        program.step()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for program in order:
                program.step()  # caches are warm again afterwards
                program.samples_s += [program.step() for _ in range(TIMED_STEPS)]
    finally:
        gc.enable()


def run_model(
    model: Model, cluster: Any, rounds: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary row, a row per plan) of one model."""
    import jax
    import numpy as np

    from alpa_lite.models import build

    setup = build(model.preset, **model.overrides)
    state = jax.tree.map(np.asarray, jax.jit(setup.init)(jax.random.key(0)))
    batch = setup.make_batch(0, model.batch_size)
    programs = planned_programs(setup, state, batch, cluster)
    programs += handwritten_programs(model, setup, state, batch)
    check_losses(programs, setup, state, batch)
    measure(programs, rounds)
    best = min(programs, key=lambda p: p.measured_s)
    planned = [p for p in programs if p.predicted_s is not None]
    auto = programs[0]
    by_hand = min((p for p in programs if p.predicted_s is None), key=lambda p: p.measured_s)
    summary = {
        "model": model.name,
        "parameters": setup.num_parameters / 1e6,
        "plans": len(programs),
        "auto_mesh": auto.detail["mesh"],
        "auto_ms": 1e3 * auto.measured_s,
        "best": best.name,
        "best_ms": 1e3 * best.measured_s,
        "regret": auto.measured_s / best.measured_s,
        "by_hand": by_hand.name.removeprefix("by hand: "),
        "by_hand_ms": 1e3 * by_hand.measured_s,
        "tau": kendall_tau([p.predicted_s or 0 for p in planned], [p.measured_s for p in planned]),
        "ratio": statistics.median((p.predicted_s or 0) / p.measured_s for p in planned),
    }
    rows = [_plan_row(model, p, best) for p in sorted(programs, key=lambda p: p.measured_s)]
    return summary, rows


def _plan_row(model: Model, p: Program, best: Program) -> dict[str, Any]:
    quarters = statistics.quantiles(p.samples_s, n=4)
    return {
        "model": model.name,
        "plan": p.name,
        "mesh": p.detail["mesh"],
        "compute_ms": _ms(p.detail.get("compute_s")),
        "communication_ms": _ms(p.detail.get("communication_s")),
        "predicted_ms": _ms(p.predicted_s),
        "measured_ms": 1e3 * p.measured_s,
        "spread": (quarters[2] - quarters[0]) / p.measured_s,
        "to_best": p.measured_s / best.measured_s,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _copy(x: Any, sharding: Any) -> Any:
    """A private copy on the devices: donation must not reach the others'."""
    import jax
    import numpy as np

    return jax.device_put(np.array(x), sharding)


def main() -> None:
    """Measure all models, print and save both tables."""
    options = parse_options(
        __doc__, [m.name for m in MODELS], cluster="a calibrated cluster file, not to calibrate"
    )
    configure_virtual_cpu_devices(NUM_DEVICES)
    import alpa_lite

    if options.more["cluster"]:
        cluster = alpa_lite.Cluster.load(options.more["cluster"])
    else:
        cluster = alpa_lite.calibrate(quick=options.quick)
    summaries, plans = [], []
    for model in MODELS:
        if model.name not in options.chosen:
            continue
        load = os.getloadavg()[0]
        summary, rows = run_model(model, cluster, QUICK_ROUNDS if options.quick else ROUNDS)
        print(f"load before {load:.1f}; {summary}", flush=True)
        for row in rows:
            print("   ", _shown(row), flush=True)
        summaries.append(summary)
        plans += rows
    if not options.save:
        return
    shared = {
        "command": "python -m benchmarks.regret",
        "environment": describe_environment(f"{NUM_DEVICES} virtual CPU devices"),
    }
    ResultsTable(
        title=f"Step time of the chosen plan over that of the best plan measured (regret); "
        f"medians of {ROUNDS * TIMED_STEPS} steps in turns",
        columns=SUMMARY_COLUMNS, rows=tuple(summaries), **shared,
    ).save("regret")  # fmt: skip
    ResultsTable(
        title="Predicted and measured step time of every plan", columns=PLAN_COLUMNS,
        rows=tuple(plans), **shared,
    ).save("regret_plans")  # fmt: skip


def _shown(row: dict[str, Any]) -> str:
    return " ".join(
        f"{row[c.key]:{c.format}}" if row[c.key] is not None else "-" for c in PLAN_COLUMNS
    )


SUMMARY_COLUMNS = (
    Column("model", "Model"),
    Column("parameters", "Parameters M", ".2f"),
    Column("plans", "Plans", "d"),
    Column("auto_mesh", "Chosen mesh"),
    Column("auto_ms", "Chosen ms", ".1f"),
    Column("best", "Best plan"),
    Column("best_ms", "Best ms", ".1f"),
    Column("regret", "Regret", ".3f"),
    Column("by_hand", "Best by hand"),
    Column("by_hand_ms", "By hand ms", ".1f"),
    Column("tau", "Kendall's tau", ".2f"),
    Column("ratio", "Predicted / measured", ".2f"),
)
PLAN_COLUMNS = (
    Column("model", "Model"),
    Column("plan", "Plan"),
    Column("mesh", "Mesh"),
    Column("compute_ms", "Compute ms", ".1f"),
    Column("communication_ms", "Communication ms", ".1f"),
    Column("predicted_ms", "Predicted ms", ".1f"),
    Column("measured_ms", "Measured ms", ".1f"),
    Column("spread", "Spread", ".0%"),
    Column("to_best", "Over best", ".2f"),
)

if __name__ == "__main__":
    main()
