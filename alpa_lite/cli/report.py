"""`alpa-lite report`: a plan as one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import jax
import typer

from alpa_lite.cli.configuration import Configuration
from alpa_lite.cli.exits import InputError
from alpa_lite.cli.explain import PlanAgain, explain_whole
from alpa_lite.cli.options import JsonOption, PlanArgument, TargetOption
from alpa_lite.cli.output import Report, check_folder, print_json, progress_bar, remark
from alpa_lite.passes.html import report_page
from alpa_lite.passes.html.sections import Solved
from alpa_lite.passes.pipeline_plan import PipelinePlan, load_plan
from alpa_lite.passes.plan import Plan


def report(
    file: PlanArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Write the page here.")
    ] = Path("report.html"),
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Plan again to show recipes used by hand, what binds, and memory over the step.",
        ),
    ] = False,
    target: TargetOption = None,
    json: JsonOption = False,
) -> None:
    """Write a plan as one HTML file, to be read and passed on.

    Timeline, memory by its parts, layouts to search in, communication by mesh axis, cost,
    alternatives, assumptions and versions. The file needs no network; without --explain everything
    comes from the plan file. With --json the output is an object with output (the file) and
    num_bytes.
    """
    check_folder(output, "--output")
    plan = load_plan(file)
    solved = None
    if explain:
        asked = Configuration.of_plan(plan, target)
        asked.make_method()
        jax.config.update("jax_platforms", "cpu")
        with progress_bar() as progress:
            solved = solve_again(plan, asked, progress)
    text = report_page(plan, solved).encode()
    try:
        output.write_bytes(text)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error.strerror})") from None
    if json:
        print_json({"output": str(output), "num_bytes": len(text)})
    else:
        remark(f"saved to {output}")


def solve_again(plan: Plan | PipelinePlan, asked: Configuration, progress: Report) -> Solved:
    """What `--explain` adds."""
    progress(f"tracing {plan.name}", 0.0)
    again = PlanAgain.of(plan, asked)
    sensitivity, baselines = explain_whole(again, progress)
    if isinstance(plan, PipelinePlan):
        return Solved(sensitivity=sensitivity, baselines=baselines)
    moments, memory = again.variants(None).memory()
    return Solved(sensitivity=sensitivity, baselines=baselines, moments=moments, memory=memory)
