"""`alpa-lite simulate`: the step that a plan expects, as a table and as a trace for Perfetto.

Everything comes from the plan file; no device is started and nothing is traced.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from alpa_lite.cli.exits import InputError
from alpa_lite.cli.options import JsonOption, PlanArgument
from alpa_lite.cli.output import check_folder, make_table, print_json, remark, stdout_console
from alpa_lite.passes.pipeline_plan import load_plan
from alpa_lite.passes.units import format_bytes, format_seconds
from alpa_lite.runtime.trace import BUBBLE, TraceRun, plan_run, write_trace

# What a mesh spends a step on, in the order of the columns; tasks of all kinds are compute.
_COMPUTE, _COMMUNICATION, _UPDATE = "compute", "communication", "update"


def simulate(
    file: PlanArgument,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a trace here, compressed if the name ends in .gz; open it in "
            "https://ui.perfetto.dev.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show when a step is expected to do what, and draw it.

    In the trace every mesh is a track with its compute, its bubble and its update; every pair of
    meshes that sends is another; a curve shows the memory in use. `alpa_lite.write_trace` draws
    measured steps the same way. The collectives of a stage are part of its tasks.

    With --json the output is an object with step_s, meshes (a list of objects with mesh, compute_s,
    communication_s, update_s, bubble_s, peak_bytes), links (source, target, seconds, transfers)
    and trace (the file written, or null).
    """
    if trace is not None:
        check_folder(trace, "--trace")
    plan = load_plan(file)
    run = plan_run(plan)
    if trace is not None:
        try:
            write_trace(trace, run)
        except OSError as error:
            raise InputError(f"--trace {trace} cannot be written ({error.strerror})") from None
        remark(f"saved to {trace}; open it in https://ui.perfetto.dev")
    meshes, links = mesh_seconds(run), link_seconds(run)
    if json:
        print_json(
            {
                "step_s": plan.predicted.step_s,
                "meshes": meshes,
                "links": links,
                "trace": None if trace is None else str(trace),
            }
        )
        return
    console = stdout_console()
    header = ("mesh", "compute", "communication", "update", "bubble", "peak memory")
    rows = [
        (
            str(each["mesh"]), *(format_seconds(each[f"{name}_s"]) for name in header[1:5]),
            format_bytes(each["peak_bytes"]),
        )
        for each in meshes
    ]  # fmt: skip
    title = f"One step of {plan.name}: {format_seconds(plan.predicted.step_s)}"
    console.print(make_table(title, header, rows, right=range(1, 6)))
    if links:
        sent = [
            (
                str(each["source"]), str(each["target"]), str(each["transfers"]),
                format_seconds(each["seconds"]),
            )
            for each in links
        ]  # fmt: skip
        console.print(
            make_table(
                "Between meshes", ("from mesh", "to mesh", "transfers", "all together"), sent,
                right={2, 3},
            )
        )  # fmt: skip


def mesh_seconds(run: TraceRun) -> list[dict[str, Any]]:
    """Per mesh, what the seconds of its track are spent on; they add up to the step."""
    spent: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for each in run.slices:
        if each.target is None:
            other = each.kind in (BUBBLE, _UPDATE, _COMMUNICATION)
            spent[each.mesh][each.kind if other else _COMPUTE] += each.seconds
    kinds = (_COMPUTE, _COMMUNICATION, _UPDATE, BUBBLE)
    return [
        {
            "mesh": mesh,
            **{f"{kind}_s": spent[mesh][kind] for kind in kinds},
            "peak_bytes": max((held for _, held in run.memory[mesh]), default=0),
        }
        for mesh in sorted(spent)
    ]


def link_seconds(run: TraceRun) -> list[dict[str, Any]]:
    """Per pair of meshes, what is sent from the first to the second."""
    sent: dict[tuple[int, int], list[float]] = defaultdict(list)
    for each in run.slices:
        if each.target is not None:
            sent[each.mesh, each.target].append(each.seconds)
    return [
        {"source": source, "target": target, "seconds": sum(each), "transfers": len(each)}
        for (source, target), each in sorted(sent.items())
    ]
