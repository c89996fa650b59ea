"""What a user means by a name: inputs and decisions of a plan, found by path, pattern or part."""

from __future__ import annotations

import difflib
import fnmatch
import re

from alpa_lite.cli.exits import InputError
from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.plan_text import printable

_STAGE = re.compile(r"stage[ :-]?([0-9]{1,9})", re.IGNORECASE)


def find_inputs(text: str, plan: Plan) -> list[str]:
    """The inputs that a user means: a path, a shell pattern, or a part of a path.

    Of the inputs that have such a part, those under `params` are meant, if there are any: the
    moments of an optimizer have the same paths below theirs.

    Raises:
      InputError: there is none.
    """
    names = list(plan.inputs)
    if text in names:
        return [text]
    found = [name for name in names if fnmatch.fnmatchcase(name, text)]
    if not found:
        found = [name for name in names if f".{text}." in f".{name}."]
        found = [name for name in found if ".params." in f".{name}."] or found
    if not found:
        close = difflib.get_close_matches(text, names, n=3, cutoff=0.5) or names[:3]
        raise InputError(
            f"{printable(text)!r} is no input of the plan and no part of one; "
            f"inputs are, for example, {', '.join(map(printable, close))}"
        )
    return found


def find_subjects(text: str, plan: Plan) -> tuple[list[str], list[str]]:
    """The inputs that a user means, or else the decisions about operations.

    Returns:
      Paths of inputs, and names of decisions; one of them is empty.

    Raises:
      InputError: there is neither.
    """
    try:
        return find_inputs(text, plan), []
    except InputError:
        names = [decision.name for decision in plan.decisions]
        found = [name for name in names if name == text]
        found = found or [name for name in names if fnmatch.fnmatchcase(name, text)]
        found = found or [name for name in names if text in name]
        if not found:
            close = difflib.get_close_matches(text, [*plan.inputs, *names], n=3, cutoff=0.4)
            hint = f"; close are {', '.join(map(printable, close))}" if close else ""
            raise InputError(
                f"{printable(text)!r} is no input of the plan and no operation{hint}"
            ) from None
        return [], found


def find_stage(text: str, plan: Plan | PipelinePlan) -> int | None:
    """The number in `stage 3`; None if the text has not that form.

    Raises:
      InputError: the plan has no such stage.
    """
    match = _STAGE.fullmatch(text.strip())
    if match is None:
        return None
    if isinstance(plan, Plan):
        raise InputError(f"{text}: the plan has no stages; it is for one mesh")
    index = int(match[1])
    if index >= len(plan.stages):
        raise InputError(f"{text}: the plan has stages 0 to {len(plan.stages) - 1}")
    return index
