"""From a configuration to a plan, for every verb that plans."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from alpa_lite.api import parallelize
from alpa_lite.cli.configuration import Configuration
from alpa_lite.cli.exits import InputError
from alpa_lite.cli.output import Report, check_folder, print_json, progress_bar, remark
from alpa_lite.errors import InfeasibleError
from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.plan import Plan


def plan_again(asked: Configuration, report: Report) -> Plan | PipelinePlan:
    """Plan what was asked for; the plan says what that was, resolved.

    Raises:
      InfeasibleError: nothing fits.
      InputError: the configuration contradicts itself, or its target.
    """
    method = asked.make_method()
    # Shapes are all that planning needs: accelerators are left alone.
    jax.config.update("jax_platforms", "cpu")
    resolved, found = asked.load()
    step = parallelize(_named(found.step, found.name), method=method, cluster=asked.cluster)
    made = step.plan(found.state, found.batch, progress=report)
    return replace(made, configuration=resolved.to_json())


def plan_and_save(
    asked: Configuration, output: Path | None, *, as_json: bool
) -> Plan | PipelinePlan:
    """`plan_again` with a progress bar; the plan is written to `output` if that is given.

    Raises:
      InfeasibleError: nothing fits; with `as_json` it is printed as an object first.
      InputError: see `plan_again`; or `output` cannot be written.
    """
    if output is not None:
        check_folder(output, "--output")
    try:
        with progress_bar() as report:
            made = plan_again(asked, report)
    except InfeasibleError as error:
        if as_json:
            print_json(infeasible_json(error))
        raise
    if output is not None:
        save_plan(made, output)
    return made


def save_plan(plan: Plan | PipelinePlan, path: Path) -> None:
    """Write a plan file, and say so.

    Raises:
      InputError: it cannot be written.
    """
    try:
        plan.save(path)
    except OSError as error:
        raise InputError(f"--output {path} cannot be written ({error.strerror})") from None
    remark(f"saved to {path}")


def infeasible_json(error: InfeasibleError) -> dict[str, Any]:
    """That nothing fits, for `--json`."""
    return {
        "error": "infeasible",
        "message": str(error),
        "need_bytes": error.need_bytes,
        "budget_bytes": error.budget_bytes,
        "row": error.row,
        "breakdown": dict(error.breakdown),
    }


def _named(step: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same step under the name that the plan is to carry."""

    @functools.wraps(step)
    def named(*args: Any) -> Any:
        return step(*args)

    named.__name__ = name
    return named
