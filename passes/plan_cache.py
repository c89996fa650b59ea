"""A folder of plan files, found again by step, cluster and options: `PlanCache`.

The files are ordinary plan files, read like any other: checked, never unpickled.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from alpa_lite.cost_model import Cluster
from alpa_lite.cost_model.cluster_json import cluster_to_json
from alpa_lite.errors import PlanError
from alpa_lite.ir.graph import graph_hash
from alpa_lite.ir.trace import trace_whole_gradient
from alpa_lite.passes.methods import Method
from alpa_lite.passes.pipeline import StepArgs
from alpa_lite.passes.pipeline_plan import PipelinePlan, load_plan
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.report import versions


@dataclass(frozen=True, slots=True)
class PlanCache:
    """Plans that were made before.

    Attributes:
      folder: where they are; made when the first is written.
    """

    folder: Path

    def path(self, step: StepArgs, method: Method, cluster: Cluster) -> Path:
        """The file of a plan; traces the step.

        Its name depends on the traced step, on every option of the method, on every figure of the
        cluster, and on the versions of the packages that planning depends on.
        """
        traced, _ = trace_whole_gradient(step.fun, *step.args, arg_names=step.arg_names)
        parts = {
            "graph": graph_hash(traced.graph),
            "batch": step.batch_argnums,
            "donate": step.donate_argnums,
            "method": repr(method),
            "cluster": cluster_to_json(cluster),
            "versions": versions(),
        }
        text = json.dumps(parts, sort_keys=True)
        return self.folder / f"{step.name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def load(self, path: Path) -> Plan | PipelinePlan | None:
        """The plan in a file; None if there is none, or none that can be read."""
        if not path.exists():
            return None
        try:
            return load_plan(path)
        except PlanError as error:
            warnings.warn(f"the plan cache is not used: {error}; planning again", stacklevel=2)
            return None

    def save(self, path: Path, plan: Plan | PipelinePlan) -> None:
        """Keep a plan."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plan.save(path)
