"""From a planned step to a compiled program: `lower_step`, `Executable`.

In: a `PlannedStep` and devices. Out: one `jax.jit` of one `jax.shard_map`, with the input and
output shardings of the plan, the state donated. Inside, every device evaluates the graph on its own
parts (`microbatches`), so the compiled program has the plan's collectives and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from alpa_lite.errors import PlanError
from alpa_lite.ir.graph import Graph, Literal
from alpa_lite.ir.sharding import Mesh, ShardingSpec
from alpa_lite.passes.pipeline import PlannedStep
from alpa_lite.passes.plan import Plan
from alpa_lite.runtime.arguments import Inputs, OwnResults, find_rivals, place
from alpa_lite.runtime.interpreter import Interpreter
from alpa_lite.runtime.microbatches import run_step


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Executable:
    """A step ready to run.

    Attributes:
      plan: what it does.
      mesh: the devices.
      compiled: JAX's compiled program.
      inputs: its input leaves.
      in_tree, out_tree: pytree structures of arguments and result.
      own: results of the latest call.
    """

    plan: Plan
    mesh: jax.sharding.Mesh
    compiled: Any
    inputs: Inputs
    in_tree: Any
    out_tree: Any
    own: OwnResults

    @property
    def in_shardings(self) -> tuple[NamedSharding, ...]:
        """Layout of every input leaf."""
        return self.inputs.shardings

    def __call__(self, *args: Any) -> Any:
        """Run one step; arguments are laid out as planned if they are not yet.

        Args:
          *args: the arguments without static ones; those passed by keyword last, by name.

        Raises:
          TypeError: the arguments have another structure, shape or dtype, or are traced.
          ValueError: an argument was deleted or donated.
        """
        leaves, tree = jax.tree.flatten(args)
        if tree != self.in_tree:
            raise TypeError(
                f"the step was compiled for arguments {self.in_tree}, called with {tree}"
            )
        return self.run(leaves)

    def run(self, leaves: Sequence[Any]) -> Any:
        """Run one step on the leaves of its arguments."""
        results = self.compiled(*place(self.inputs, leaves, self.own))
        self.own.replace(results)
        return jax.tree.unflatten(self.out_tree, results)

    def as_text(self) -> str:
        """The optimised HLO."""
        return self.compiled.as_text()


def lower_step(
    planned: PlannedStep, full_avals: Sequence[Any], donate: Sequence[int],
    devices: Sequence[jax.Device] | None = None, own: OwnResults | None = None,
) -> Executable:  # fmt: skip
    """Compile a planned step.

    Args:
      planned: plan and layouts.
      full_avals: shape, dtype and weak type of every input leaf, at the full batch size.
      donate: positions of the input leaves to donate.
      devices: in mesh order; the attached ones by default.
      own: where programs that hand on one state keep which arrays they returned.

    Raises:
      PlanError: the plan needs another number of devices.
    """
    d = planned.decisions
    mesh = device_mesh(d.mesh, devices)
    interpreter = Interpreter(d)
    program = d.contraction.program
    in_specs = [
        d.result_specs[program.link_at["input", (), i]][0] for i in range(len(program.graph.inputs))
    ]
    out_specs = [interpreter.output_spec(i) for i in range(len(program.graph.outputs))]
    # One object per layout: that a result lies where the next call wants it is then seen at once.
    shardings = {s: sharding(mesh, s) for s in (*in_specs, *out_specs)}
    in_shardings = tuple(shardings[s] for s in in_specs)
    avals = tuple(
        jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=getattr(a, "weak_type", False))
        for a in full_avals
    )

    def step(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        results = run_step(interpreter, planned.output_kinds, inputs)
        return tuple(as_traced(program.graph, i, x) for i, x in enumerate(results))

    compiled = compile_local(
        step, mesh, avals, in_shardings, tuple(shardings[s] for s in out_specs), tuple(donate),
    )  # fmt: skip
    traced = program.step
    inputs = Inputs(
        traced.graph.input_names, avals, in_shardings, frozenset(donate),
        find_rivals(avals, in_shardings, donate),
    )  # fmt: skip
    return Executable(
        planned.plan, mesh, compiled, inputs, traced.in_tree, traced.out_tree, own or OwnResults()
    )


def compile_local(
    local: Callable[..., tuple[Any, ...]], mesh: jax.sharding.Mesh,
    avals: Sequence[jax.ShapeDtypeStruct], in_shardings: Sequence[NamedSharding],
    out_shardings: Sequence[NamedSharding], donate: Sequence[int],
) -> Any:  # fmt: skip
    """Compile what every device does with its parts.

    Args:
      local: a flat function of this device's parts, to be run inside `jax.shard_map`.
      mesh: the devices.
      avals: shapes and dtypes of the whole arguments.
      in_shardings: their layouts.
      out_shardings: layouts of the results.
      donate: positions of the arguments to donate.
    """
    step = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(s.spec for s in in_shardings),
        out_specs=tuple(s.spec for s in out_shardings),
        check_vma=False,
    )
    jitted = jax.jit(
        step,
        in_shardings=tuple(in_shardings),
        out_shardings=tuple(out_shardings),
        donate_argnums=tuple(donate),
        keep_unused=True,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    return jitted.lower(*avals).compile()


def compiler_options(platform: str) -> dict[str, bool]:
    """XLA options that programs with collectives need.

    On the CPU, XLA's concurrency-optimised schedule lets a loop and a collective outside of it run
    at once. Devices may then meet the loop's collectives and the other in different orders and wait
    for each other until XLA aborts the process ("Termination timeout for 'all gather ...'"). Seen
    with jax 0.10.2 on some runs of a random program of the tests; on none without that schedule.
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


def as_traced(graph: Graph, output: int, x: Any) -> Any:
    """An output as weak as it was traced.

    State must come out as it went in, or the next call differs.
    """
    operand = graph.outputs[output]
    aval = operand.aval if isinstance(operand, Literal) else graph.values[operand].aval
    weak = getattr(aval, "weak_type", False)
    if getattr(jax.typeof(x), "weak_type", False) == weak:
        return x
    return jax.lax.convert_element_type_p.bind(x, new_dtype=x.dtype, weak_type=weak, sharding=None)
