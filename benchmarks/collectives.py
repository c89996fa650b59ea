"""The collectives of a plan against those of the program that XLA compiled from it.

    python -m benchmarks.collectives [--quick] [--only gpt-test mlp-test]

Every test preset is planned by every method on 8 virtual CPU devices and compiled; nothing is run.
Bytes per collective kind and mesh axes come from `Plan.predicted.collectives` on one side, from the
optimised HLO on the other. What XLA merges is foretold by `passes.compiler_merges`, like the note
in the plan; what is left is unexplained.
Writes `results/collectives.json`, unless models were selected.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from alpa_lite.virtual_devices import configure_virtual_cpu_devices
from benchmarks.options import parse_options
from benchmarks.results_table import Column, ResultsTable, describe_environment

NUM_DEVICES = 8
BATCH_SIZE = 16
SAME = 0.01  # relative difference that counts as none

Key = tuple[str, tuple[str, ...] | None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One plan and its program.

    Attributes:
      model, method, mesh: what was planned.
      predicted, compiled: bytes per device and step, by kind and mesh axes.
      saved: of the predicted bytes, what XLA is expected to merge.
    """

    model: str
    method: str
    mesh: str
    predicted: dict[Key, float]
    compiled: dict[Key, float]
    saved: dict[Key, float]

    @property
    def difference(self) -> float:
        """The largest of any kind and axes, relative to the larger of the two figures."""
        return max((relative_difference(*pair) for pair in self.pairs().values()), default=0.0)

    @property
    def unexplained(self) -> float:
        """The same, with what XLA saves taken off the predictions."""
        return max(
            (
                relative_difference(predicted - self.saved.get(key, 0.0), compiled)
                for key, (predicted, compiled) in self.pairs().items()
            ),
            default=0.0,
        )

    def pairs(self) -> dict[Key, tuple[float, float]]:
        """(predicted, compiled) bytes of every kind and axes that either side has."""
        keys = sorted(self.predicted.keys() | self.compiled.keys(), key=str)
        return {key: (self.predicted.get(key, 0.0), self.compiled.get(key, 0.0)) for key in keys}

    def explanation(self) -> str:
        """Why the two sides differ, or an empty text."""
        if self.difference <= SAME:
            return ""
        if self.unexplained > SAME:
            return "not explained"
        return "XLA runs collectives of equal values once"

    def row(self) -> dict[str, Any]:
        """The row of the table."""
        return {
            "model": self.model,
            "method": self.method,
            "mesh": self.mesh,
            "predicted_mb": sum(self.predicted.values()) / 1e6,
            "compiled_mb": sum(self.compiled.values()) / 1e6,
            "difference": self.difference,
            "unexplained": self.unexplained,
            "explanation": self.explanation(),
        }


def relative_difference(a: float, b: float) -> float:
    """Distance over the larger of the two."""
    return abs(a - b) / max(a, b) if abs(a - b) > 1e-6 else 0.0


def methods() -> list[tuple[str, Any]]:
    """(name, method) of every case."""
    import alpa_lite as al

    meshes = ((8,), (2, 4), (2, 2, 2))
    return [
        *((f"AutoParallel {'x'.join(map(str, m))}", al.AutoParallel(mesh_shape=m)) for m in meshes),
        ("ShardParallel", al.ShardParallel()),
        ("DataParallel", al.DataParallel()),
        ("Zero1Parallel", al.Zero1Parallel()),
        ("Zero2Parallel", al.Zero2Parallel()),
        ("Zero3Parallel", al.Zero3Parallel()),
        (
            "AutoParallel 2x4, 2 microbatches",
            al.AutoParallel(mesh_shape=(2, 4), num_microbatches=2),
        ),
        ("Zero3Parallel, 2 microbatches", al.Zero3Parallel(num_microbatches=2)),
    ]


def sharding_pays() -> Any:
    """A cluster on which tiny models are worth splitting: slow devices with fast links.

    On `cpu:8` as it is, some of them would rather run replicated, with nothing to compare.
    """
    from alpa_lite.cost_model import Cluster

    base = Cluster.parse(f"cpu:{NUM_DEVICES}")
    device = dataclasses.replace(
        base.device, flops_per_s={"float32": 1e8}, hbm_bytes_per_s=1e8, op_overhead_s=0.0
    )
    link = dataclasses.replace(base.intra_host, alpha_s=1e-7, bytes_per_s=1e10)
    return dataclasses.replace(base, device=device, intra_host=link, collective_overhead_s=0.0)


def compare(model: str, name: str, method: Any, cluster: Any) -> Comparison:
    """Plan and compile one case."""
    import jax

    from alpa_lite.models import build
    from alpa_lite.passes.compiler_merges import merged_collectives
    from alpa_lite.passes.pipeline import StepArgs, plan_step
    from alpa_lite.passes.rules import RuleTable
    from alpa_lite.runtime.hlo import collective_bytes
    from alpa_lite.runtime.lower import lower_step

    setup = build(model)
    state, batch = setup.state_shapes(), setup.batch_shapes(BATCH_SIZE)
    call = StepArgs(
        fun=setup.step, args=(state, batch), arg_names=("state", "batch"), batch_argnums=(1,),
        donate_argnums=(0,), name=model,
    )  # fmt: skip
    planned = plan_step(call, method, cluster, table=RuleTable())
    plan = planned.plan
    donated = range(len(jax.tree.leaves(state)))
    executable = lower_step(planned, jax.tree.leaves((state, batch)), donated)
    saved: dict[Key, float] = {}
    for use in merged_collectives(planned.decisions):
        saved[use.kind, use.axes] = saved.get((use.kind, use.axes), 0.0) + (
            use.times * use.payload_bytes
        )
    return Comparison(
        model=model, method=name, mesh="x".join(map(str, plan.mesh.shape)),
        predicted={(c.kind, c.axes): c.bytes_per_step for c in plan.predicted.collectives},
        compiled=collective_bytes(executable.as_text(), plan.mesh), saved=saved,
    )  # fmt: skip


def main() -> None:
    """Compare all cases, print and save the table."""
    configure_virtual_cpu_devices(NUM_DEVICES)
    from alpa_lite.models import presets

    options = parse_options(__doc__, [p for p in presets() if p.endswith("-test")])
    cluster = sharding_pays()
    rows = []
    for model in options.chosen:
        for name, method in methods():
            begun = time.perf_counter()
            found = compare(model, name, method, cluster)
            rows.append(found.row())
            print(f"{time.perf_counter() - begun:3.0f} s", *_shown(rows[-1]), flush=True)
            for key, (predicted, compiled) in found.pairs().items():
                left = predicted - found.saved.get(key, 0.0)
                if relative_difference(left, compiled) > SAME:
                    print("     ", key, predicted, left, compiled)
    if options.save:
        ResultsTable(
            title="Collectives of plans and of their compiled programs, per device and step",
            command="python -m benchmarks.collectives",
            environment=describe_environment(f"{NUM_DEVICES} virtual CPU devices"),
            columns=COLUMNS,
            rows=tuple(rows),
        ).save("collectives")


def _shown(row: dict[str, Any]) -> list[str]:
    return [f"{row[column.key]:{column.format}}" for column in COLUMNS]


COLUMNS = (
    Column("model", "Model"),
    Column("method", "Method"),
    Column("mesh", "Mesh"),
    Column("predicted_mb", "Predicted MB", ".3f"),
    Column("compiled_mb", "Compiled MB", ".3f"),
    Column("difference", "Largest difference", ".1%"),
    Column("unexplained", "Unexplained", ".1%"),
    Column("explanation", "Explanation"),
)

if __name__ == "__main__":
    main()
