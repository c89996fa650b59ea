"""`alpa-lite diff` and `alpa-lite whatif`: two plans, or a plan and what would change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from alpa_lite.cli.configuration import Configuration, parse_pins
from alpa_lite.cli.exits import InputError
from alpa_lite.cli.find import find_inputs
from alpa_lite.cli.options import (
    BudgetOption,
    JsonOption,
    PinOption,
    PlanArgument,
    SetOption,
    TargetOption,
    parse_overrides,
)
from alpa_lite.cli.output import print_json
from alpa_lite.cli.planning import plan_and_save
from alpa_lite.passes.pipeline_plan import PipelinePlan, load_plan
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.plan_diff import describe_diff, diff_plans
from alpa_lite.passes.plan_text import format_axes


def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A plan file.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Another.")],
    json: JsonOption = False,
) -> None:
    """Show what differs between two plans, in plan terms and in seconds and bytes.

    No device is started. Exits with 0 whether they differ or not. With --json the output is a list
    of objects with section, name, before, after, unit ("s", "bytes" or "") and ratio (after over
    before, of seconds and bytes).
    """
    changes = diff_plans(load_plan(before), load_plan(after))
    if json:
        print_json([change.to_json() for change in changes])
    else:
        print(describe_diff(changes))


def whatif(
    file: PlanArgument,
    overrides: SetOption = None,
    pins: PinOption = None,
    memory_budget: BudgetOption = None,
    target: TargetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save the new plan here.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Plan again with something changed, and show what that changes.

    The plan has to be one that `alpa-lite plan` made: it says what was asked for. A pin names an
    input, a shell pattern of inputs, or a part of the path of a parameter (layers.3.mlp.up); with
    pins the mesh of the plan is kept unless --set mesh=dp=2,tp=4 says otherwise.

    Exits with 2 if nothing fits. With --json the output is an object with changes (as `diff`
    prints them) and plan (the content of the new plan file).
    """
    plan = load_plan(file)
    asked = Configuration.of_plan(plan, target)
    changed = {} if memory_budget is None else {"memory_budget": memory_budget}
    wanted = asked.changed(parse_overrides(overrides or []) | changed)
    if pins:
        wanted = with_pins(wanted, parse_pins(pins), plan)
    if wanted == asked:
        raise InputError("nothing is changed: give --set, --pin or --memory-budget")
    made = plan_and_save(wanted, output, as_json=json)
    changes = diff_plans(plan, made)
    if json:
        print_json({"changes": [c.to_json() for c in changes], "plan": made.to_json()})
    else:
        print(describe_diff(changes))


def with_pins(
    wanted: Configuration, pins: Mapping[str, str], plan: Plan | PipelinePlan
) -> Configuration:
    """With some layouts prescribed.

    Args:
      wanted: the rest.
      pins: what the user named -> `P(...)`.
      plan: whose inputs they are; its mesh is kept if none is asked for.

    Raises:
      InputError: the plan has stages, or a pin names nothing.
    """
    if isinstance(plan, PipelinePlan):
        raise InputError(
            "--pin is for plans on one mesh; in a plan with stages edit the layouts of a stage in "
            "the file, or prescribe the grid: --set method=3d --set mesh=dp=2,tp=4,pp=2"
        )
    found = dict(wanted.pins)
    for text, spec in pins.items():
        found |= dict.fromkeys(find_inputs(text, plan), spec)
    mesh = wanted.mesh
    if mesh is None or "=" not in mesh:
        mesh = format_axes(plan.mesh.axes).replace(" ", "")
    return replace(wanted, pins=found, mesh=mesh)
