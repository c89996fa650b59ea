"""`alpa-lite plan` and `alpa-lite show`: make a plan without the cluster, read one again.

Neither starts a device; a factory that makes arrays makes them on the CPU.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from alpa_lite.cli.configuration import Configuration, parse_pins
from alpa_lite.cli.options import (
    BudgetOption,
    JsonOption,
    MeshOption,
    MethodName,
    MethodOption,
    MicrobatchesOption,
    OptimizerOption,
    PinOption,
    PlanArgument,
    RematOption,
    ScheduleOption,
    SetOption,
    parse_overrides,
)
from alpa_lite.cli.output import print_json, remark
from alpa_lite.cli.planning import plan_and_save
from alpa_lite.cost_model import Cluster
from alpa_lite.models import presets
from alpa_lite.passes.flag_names import FLAGS
from alpa_lite.passes.pipeline_plan import PipelinePlan, load_plan
from alpa_lite.passes.plan import Plan


class Program(StrEnum):
    """What `show --as` may say."""

    MEGATRON = "megatron"
    MAXTEXT = "maxtext"


def complete_target(incomplete: str) -> list[str]:
    """Presets that begin so, for shells."""
    return [name for name in presets() if name.startswith(incomplete)]


def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            autocompletion=complete_target,
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
    pins: PinOption = None,
    json: JsonOption = False,
) -> None:
    """Plan a train step for a cluster and print the plan.

    Runs anywhere and leaves accelerators alone. Exits with 2 if nothing fits and with 3 on bad
    input. With --json the output is the content of a plan file, or, if nothing fits, an object
    with error, message, need_bytes, budget_bytes, row and breakdown.
    """
    asked = Configuration(
        target=target, cluster=Cluster.resolve(cluster), batch_size=batch_size, method=method,
        optimizer=optimizer, mesh=mesh, num_microbatches=num_microbatches,
        memory_budget=memory_budget, schedule=schedule, remat=remat, pins=parse_pins(pins or []),
    )  # fmt: skip
    asked = asked.changed(parse_overrides(overrides or []))
    made = plan_and_save(asked, output, as_json=json)
    _print_plan(made, as_json=json)


def show(
    file: PlanArgument,
    program: Annotated[
        Program | None,
        typer.Option("--as", help="Print the nearest flags of another program instead."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check a plan file and print it.

    No device is started. Exits with 3 if the file is not a valid plan. With --json the output is
    the content of the file as it was understood; with --as an object with flags (name and value of
    each) and remarks.
    """
    plan = load_plan(file)
    if program is None:
        _print_plan(plan, as_json=json)
        return
    found = FLAGS[program.value](plan)
    if json:
        print_json({"flags": found.flags, "remarks": found.remarks})
        return
    for name, value in found.flags:
        space = "=" if program == Program.MAXTEXT else " "
        print(f"{name}{space}{value}".strip())
    for text in found.remarks:
        remark(f"note: {text}")


def _print_plan(plan: Plan | PipelinePlan, *, as_json: bool) -> None:
    if as_json:
        print_json(plan.to_json())
    else:
        print(plan.describe())
