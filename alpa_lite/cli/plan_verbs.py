"""`alpa-lite plan` and `alpa-lite show`: make a plan without the cluster, read one again.

Neither starts a device; a factory that makes arrays makes them on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from alpa_lite.api import parallelize
from alpa_lite.cli.exits import InputError
from alpa_lite.cli.options import (
    BudgetOption,
    JsonOption,
    MeshOption,
    MethodName,
    MethodOption,
    MicrobatchesOption,
    OptimizerOption,
    PlanArgument,
    RematOption,
    ScheduleOption,
    SetOption,
    make_method,
    parse_overrides,
)
from alpa_lite.cli.output import check_folder, print_json, progress_bar, remark
from alpa_lite.cli.target import load_target
from alpa_lite.cost_model import Cluster
from alpa_lite.errors import InfeasibleError
from alpa_lite.passes.pipeline_plan import PipelinePlan, load_plan
from alpa_lite.passes.plan import Plan


def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A model preset (see `alpa-lite models`), or package.module:factory where "
            "factory() returns (step, state_shapes, batch_shapes) or a ModelSetup.",
        ),
    ],
    cluster: Annotated[
        str,
        typer.Option(
            metavar="CLUSTER",
            help="The hardware: KIND:HOSTSxDEVICES, KIND:DEVICES, or a cluster file; see "
            "`alpa-lite clusters`.",
        ),
    ],
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Per step, over all devices.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save the plan here.")
    ] = None,
    method: MethodOption = MethodName.AUTO,
    mesh: MeshOption = None,
    num_microbatches: MicrobatchesOption = "auto",
    memory_budget: BudgetOption = None,
    schedule: ScheduleOption = None,
    remat: RematOption = None,
    optimizer: OptimizerOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Plan a train step for a cluster and print the plan.

    Runs anywhere and leaves accelerators alone. Exits with 2 if nothing fits and with 3 on bad
    input. With --json the output is the content of a plan file, or, if nothing fits, an object
    with error, message, need_bytes, budget_bytes, row and breakdown.
    """
    hardware = Cluster.resolve(cluster)
    options = make_method(
        method, microbatches=num_microbatches, mesh=mesh, memory_budget=memory_budget,
        schedule=schedule, remat=remat,
    )  # fmt: skip
    if output is not None:
        check_folder(output, "--output")
    # Shapes are all that planning needs: accelerators are left alone.
    jax.config.update("jax_platforms", "cpu")
    found = load_target(
        target, batch_size=batch_size, optimizer=optimizer,
        overrides=parse_overrides(overrides or []),
    )  # fmt: skip
    step = parallelize(_named(found.step, found.name), method=options, cluster=hardware)
    try:
        with progress_bar() as report:
            made = step.plan(found.state, found.batch, progress=report)
    except InfeasibleError as error:
        if json:
            print_json(_infeasible_json(error))
        raise
    if output is not None:
        _save(made, output)
        remark(f"saved to {output}")
    _print_plan(made, as_json=json)


def show(
    file: PlanArgument,
    json: JsonOption = False,
) -> None:
    """Check a plan file and print it.

    No device is started. Exits with 3 if the file is not a valid plan. With --json the output is
    the content of the file as it was understood.
    """
    _print_plan(load_plan(file), as_json=json)


def _print_plan(plan: Plan | PipelinePlan, *, as_json: bool) -> None:
    if as_json:
        print_json(plan.to_json())
    else:
        print(plan.describe())


def _named(step: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same step under the name that the plan is to carry."""

    @functools.wraps(step)
    def named(*args: Any) -> Any:
        return step(*args)

    named.__name__ = name
    return named


def _save(plan: Plan | PipelinePlan, path: Path) -> None:
    try:
        plan.save(path)
    except OSError as error:
        raise InputError(f"--output {path} cannot be written ({error.strerror})") from None


def _infeasible_json(error: InfeasibleError) -> dict[str, Any]:
    return {
        "error": "infeasible",
        "message": str(error),
        "need_bytes": error.need_bytes,
        "budget_bytes": error.budget_bytes,
        "row": error.row,
        "breakdown": dict(error.breakdown),
    }
