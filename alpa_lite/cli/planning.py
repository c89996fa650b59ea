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
from alpa_lite.cli.output import Report, remark
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
