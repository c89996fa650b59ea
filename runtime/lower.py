"""From a planned step to a compiled program: `lower_step`, `Executable`.

In: a `PlannedStep` and devices. Out: one `jax.jit` of one `jax.shard_map`, with the input and
output shardings of the plan, the state donated. Inside, every device evaluates the graph on its own
parts (`interpreter`), so the compiled program has the plan's collectives and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from alpa_lite.errors import PlanError
from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.pipeline import PlannedStep
from alpa_lite.passes.plan import Plan
from alpa_lite.runtime.interpreter import Interpreter


@dataclass(frozen=True, slots=True, eq=False)
class Executable:
    """A step ready to run.

    Attributes:
      plan: what it does.
      mesh: the devices.
      compiled: JAX's compiled program.
      in_shardings: per input leaf.
      in_tree, out_tree: pytree structures of arguments and result.
    """

    plan: Plan
    mesh: jax.sharding.Mesh
    compiled: Any
    in_shardings: tuple[NamedSharding, ...]
    in_avals: tuple[jax.ShapeDtypeStruct, ...]
    in_tree: Any
    out_tree: Any

    def __call__(self, *args: Any) -> Any:
        """Run one step; arguments are laid out as planned if they are not yet."""
        leaves, tree = jax.tree.flatten(args)
        if tree != self.in_tree:
            raise TypeError(
                f"the step was compiled for arguments {self.in_tree}, called with {tree}"
            )
        placed = [
            _place(x, aval, sharding)
            for x, aval, sharding in zip(leaves, self.in_avals, self.in_shardings, strict=True)
        ]
        return jax.tree.unflatten(self.out_tree, self.compiled(*placed))

    def as_text(self) -> str:
        """The optimised HLO."""
        return self.compiled.as_text()


def lower_step(
    planned: PlannedStep, full_avals: Sequence[Any], donate: Sequence[int],
    devices: Sequence[jax.Device] | None = None,
) -> Executable:  # fmt: skip
    """Compile a planned step.

    Args:
      planned: plan and layouts.
      full_avals: shape and dtype of every input leaf, at the full batch size.
      donate: positions of the input leaves to donate.
      devices: in mesh order; the attached ones by default.

    Raises:
      PlanError: the plan needs another number of devices.
    """
    d = planned.decisions
    mesh = device_mesh(d.mesh, devices)
    interpreter = Interpreter(d, planned.output_kinds)
    program = d.contraction.program
    in_specs = [
        d.result_specs[program.link_at["input", (), i]][0] for i in range(len(program.graph.inputs))
    ]
    out_specs = interpreter.output_specs()
    step = jax.shard_map(
        lambda *inputs: tuple(interpreter.run(inputs)),
        mesh=mesh,
        in_specs=tuple(s.partition_spec() for s in in_specs),
        out_specs=tuple(s.partition_spec() for s in out_specs),
        check_vma=False,
    )
    in_shardings = tuple(sharding(mesh, s) for s in in_specs)
    avals = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in full_avals)
    jitted = jax.jit(
        step,
        in_shardings=in_shardings,
        out_shardings=tuple(sharding(mesh, s) for s in out_specs),
        donate_argnums=tuple(donate),
        keep_unused=True,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    compiled = jitted.lower(*avals).compile()
    traced = program.step
    return Executable(
        planned.plan, mesh, compiled, in_shardings, avals, traced.in_tree, traced.out_tree
    )


def compiler_options(platform: str) -> dict[str, bool]:
    """XLA options that programs with collectives need.

    On the CPU, XLA's concurrency-optimised schedule lets a loop and a collective outside of it run
    at once. Devices may then meet the loop's collectives and the other in different orders and wait
    for each other until XLA aborts the process ("Termination timeout for 'all gather ...'"). Seen
    with jax 0.10.2 in 1 of about 100 runs of a small program; 1,500 runs without it passed.
    """
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if platform == "cpu" else {}


def device_mesh(mesh: Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The JAX mesh over attached devices.

    Raises:
      PlanError: too few devices.
    """
    found = list(jax.devices() if devices is None else devices)
    if len(found) < mesh.num_devices:
        raise PlanError(
            f"the plan's mesh {mesh} needs {mesh.num_devices} devices; {len(found)} are attached "
            f"({found[0].platform}). Plan for the attached devices, or run on the cluster."
        )
    grid = np.array(found[: mesh.num_devices]).reshape(mesh.shape)
    return jax.sharding.Mesh(grid, mesh.names)


def sharding(mesh: jax.sharding.Mesh, spec: ShardingSpec) -> NamedSharding:
    """JAX's sharding of a spec."""
    return NamedSharding(mesh, spec.partition_spec())


def _place(x: Any, aval: jax.ShapeDtypeStruct, wanted: NamedSharding) -> Any:
    if isinstance(x, jax.Array) and x.committed and x.sharding.is_equivalent_to(wanted, x.ndim):
        return x
    if not isinstance(x, jax.Array):
        x = np.asarray(x, aval.dtype)
    return jax.device_put(x, wanted)
