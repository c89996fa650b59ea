"""Processes that plan and compile one step agree on it: `plan_once`, `agreed`.

Process 0 plans, the others rebuild its plan: what they do must be the same to the last instruction,
and a search that stops on time finds different plans on different machines. Whatever each process
made is compared as hashes, together with the versions of its software, before anything runs; what
one process could not do is an error in all of them.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from alpa_lite.errors import InfeasibleError, PlanError, SolverTimeoutError, StepError
from alpa_lite.passes.pipeline import PlannedStep
from alpa_lite.passes.pipeline_plan import PipelinePlan, plan_from_json
from alpa_lite.passes.pipeshard import PlannedPipeline
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.report import versions
from alpa_lite.runtime.group import ProcessGroup

T = TypeVar("T")
Planned = PlannedStep | PlannedPipeline

_TIMINGS = frozenset({"wall_s"})
"""Fields of a plan that say how long planning took."""
_LONGEST = 40  # characters of a fact that messages show
_TOPIC = "agreement"


def plan_once(
    group: ProcessGroup, search: Callable[[], Planned],
    rebuild: Callable[[Plan | PipelinePlan], Planned],
) -> Planned:  # fmt: skip
    """Plan in process 0, and rebuild its plan in the others; within `agreed`.

    Args:
      group: all processes; each of them calls this.
      search: plans.
      rebuild: makes the same of a plan.

    Raises:
      AlpaLiteError: process 0 could not plan; of the class that is raised there, if it is one.
    """
    topic = f"planning/{group.turns(_TOPIC)}"
    if group.me:
        found = json.loads(group.read(topic, 0))
        if "error" in found:
            kinds = {c.__name__: c for c in (InfeasibleError, SolverTimeoutError, StepError)}
            kind = kinds.get(found["error"], PlanError)
            raise kind(f"process 0 could not plan: {found['error']}: {found['text']}")
        return rebuild(plan_from_json(found["plan"]))
    try:
        made = search()
    except Exception as error:
        group.publish(topic, _failure(error))
        raise
    group.publish(topic, json.dumps({"plan": made.plan.to_json()}).encode())
    return made


def agreed(
    group: ProcessGroup, topic: str, make: Callable[[], T], facts: Callable[[T], Mapping[str, str]]
) -> T:
    """Make something in every process, and compare what came of it.

    Args:
      group: all processes; each of them calls this.
      topic: what is being done; it has to be the same in all processes.
      make: does it.
      facts: of what was made, those that all processes must have in common.

    Raises:
      PlanError: they have not, or `make` raised something in another process.
    """
    try:
        made = make()
    except Exception as error:
        group.exchange(_TOPIC, _failure(error))
        raise
    own: dict[str, Any] = {"host": socket.gethostname(), "doing": topic}
    own["facts"] = {**software_facts(), **facts(made)}
    found = [json.loads(x) for x in group.exchange(_TOPIC, json.dumps(own).encode())]
    _check_alike(topic, found)
    return made


def plan_facts(plan: Plan | PipelinePlan) -> dict[str, str]:
    """Hashes of a plan's fields, without how long planning took."""
    fields = _without_timings(plan.to_json())
    return {f"{name} of the plan": _digest(value) for name, value in fields.items()}


def software_facts() -> dict[str, str]:
    """What runs in this process."""
    device = jax.local_devices()[0]
    return {**versions(), "platform": device.platform, "device kind": device.device_kind}


def _check_alike(topic: str, found: list[Mapping[str, Any]]) -> None:
    failed = [(i, said) for i, said in enumerate(found) if "error" in said]
    if failed:
        process, said = failed[0]
        raise PlanError(
            f"{topic}: process {process} (host {said['host']}) could not do it: {said['error']}: "
            f"{said['text']}"
        )
    if len({said["doing"] for said in found}) > 1:
        raise PlanError(
            "all processes must call the same steps in the same order; now they are "
            + ", ".join(f"{said['doing']} in process {i}" for i, said in enumerate(found))
        )
    first = found[0]["facts"]
    lines = []
    for process, said in enumerate(found):
        names = [n for n in {**first, **said["facts"]} if first.get(n) != said["facts"].get(n)]
        if names:
            shown = ", ".join(_shown(n, first.get(n), said["facts"].get(n)) for n in names)
            lines.append(f"process {process} (host {said['host']}) differs in {shown}")
    if lines:
        raise PlanError(
            f"{topic}: the processes have different plans. Compared with process 0 (host "
            f"{found[0]['host']}), {'; '.join(lines)}. Start all of them with the same code, "
            "software versions, arguments and plan file."
        )


def _shown(name: str, ours: str | None, theirs: str | None) -> str:
    if max(len(ours or ""), len(theirs or "")) > _LONGEST:
        return name
    return f"{name} ({theirs or 'none'}, not {ours or 'none'})"


def _failure(error: Exception) -> bytes:
    said = {"host": socket.gethostname(), "error": type(error).__name__, "text": str(error)}
    return json.dumps(said).encode()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_timings(v) for k, v in value.items() if k not in _TIMINGS}
    if isinstance(value, list):
        return [_without_timings(v) for v in value]
    return value
