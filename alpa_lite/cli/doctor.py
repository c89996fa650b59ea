"""`alpa-lite doctor`: what may be wrong with this installation, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict

import typer

from alpa_lite.cli.exits import FAILED
from alpa_lite.cli.health import PROBLEM, diagnose, gather
from alpa_lite.cli.options import JsonOption
from alpa_lite.cli.output import print_json, progress_bar
from alpa_lite.passes.plan_text import section


def doctor(json: JsonOption = False) -> None:
    """Check this installation: JAX, devices, GPU plugin, CPU threads, solver.

    Exits with 1 if something is in the way. With --json the output is a list of objects with name,
    status ("ok", "note" or "problem"), found and advice.
    """
    with progress_bar() as report:
        report("starting JAX", 0.0)
        findings = diagnose(gather())
    if json:
        print_json([asdict(each) for each in findings])
    else:
        rows = []
        for each in findings:
            rows.append((each.status, each.name, each.found))
            if each.advice:
                rows.append(("", "", each.advice))
        print(section("This installation", rows))
    if any(each.status == PROBLEM for each in findings):
        raise typer.Exit(FAILED)
