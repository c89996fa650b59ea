"""What `alpa-lite plan` was asked for, resolved: kept in the plan, changed by dotted overrides.

    target, batch_size, optimizer      what is planned
    model.KEY                          every setting of a model preset
    method, mesh, num_microbatches, memory_budget, schedule, remat
    pin.PATH                           layouts that were prescribed
    cluster.KEY                        the hardware; the plan has it in full, so it is not repeated

A plan file may come from someone else. Nothing in it is run: where the step is the user's own code,
`--target` has to name that code again.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jax.sharding import PartitionSpec

from alpa_lite.cli.exits import InputError
from alpa_lite.cli.options import MethodName, make_method
from alpa_lite.cli.target import Target, load_target
from alpa_lite.cost_model import Cluster
from alpa_lite.passes.methods import ManualParallel, Method
from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.plan import Plan

MODEL, PIN, CLUSTER = "model.", "pin.", "cluster."

# Options that are texts, as on the command line; None where left out.
_TEXTS = ("optimizer", "mesh", "num_microbatches", "memory_budget", "schedule", "remat")
_KEYS = ("target", "batch_size", "method", *_TEXTS)

_CLUSTER_NAMES = {"hosts": "num_hosts", "devices": "devices_per_host"}
"""Short names of fields of a cluster file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What is planned, how, and for what.

    Attributes:
      target: a preset, or `package.module:factory`.
      cluster: the hardware.
      batch_size: per step; None if the target says.
      method: name of the method.
      optimizer, mesh, num_microbatches, memory_budget, schedule, remat: texts as on the command
        line; None where left out.
      model: settings of the preset.
      pins: path or shell pattern of inputs -> `P(...)`, as text.
    """

    target: str
    cluster: Cluster
    batch_size: int | None = None
    method: MethodName = MethodName.AUTO
    optimizer: str | None = None
    mesh: str | None = None
    num_microbatches: str | None = None
    memory_budget: str | None = None
    schedule: str | None = None
    remat: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    pins: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_plan(cls, plan: Plan | PipelinePlan, target: str | None = None) -> Configuration:
        """What a plan was made from.

        Args:
          plan: as loaded.
          target: what the user says it was made from, for code that is not alpa-lite's.

        Raises:
          InputError: the plan does not say, or says something that cannot be, or names code that
            the user has not named.
        """
        known = dict(plan.configuration)
        if not known:
            raise InputError(
                f"the plan {plan.name!r} does not say what it was made from, so it cannot be "
                "planned again; plans made by `alpa-lite plan` do"
            )
        made_from = known.pop("target", None)
        if not isinstance(made_from, str):
            raise _odd("target", made_from, "text")
        if ":" in made_from and target != made_from:
            raise InputError(
                f"the plan was made from the code {made_from}, and code named by a file is not run "
                f"unasked: if you trust it, add --target {made_from}"
            )
        if target is not None and target != made_from:
            raise InputError(f"--target {target}: the plan was made from {made_from}")
        options = _read(known)
        return cls(target=made_from, cluster=plan.cluster, **options)

    def to_json(self) -> dict[str, Any]:
        """By dotted name, without what was left out and the cluster."""
        plain = {name: getattr(self, name) for name in _KEYS}
        found = {name: value for name, value in plain.items() if value is not None}
        found["method"] = self.method.value
        found |= {
            f"{MODEL}{name}": list(value) if isinstance(value, tuple) else value
            for name, value in self.model.items()
        }
        return found | {f"{PIN}{path}": spec for path, spec in self.pins.items()}

    def changed(self, overrides: Mapping[str, Any]) -> Configuration:
        """With other values for some dotted names.

        A name without a dot that is no option is a setting of the model preset.

        Raises:
          InputError: an unknown name, or a value that cannot be.
        """
        found = self
        # A whole cluster first, then its fields.
        for key in sorted(overrides, key=lambda k: k.startswith(CLUSTER)):
            found = found._with(key, overrides[key])
        return found

    def _with(self, key: str, value: Any) -> Configuration:
        if key == "cluster":
            return replace(self, cluster=Cluster.resolve(_text(key, value)))
        if key.startswith(CLUSTER):
            return replace(self, cluster=change_cluster(self.cluster, key, value))
        if key.startswith(PIN):
            raise InputError(f"--set {key}: layouts are pinned by --pin PATH=SPEC")
        if key == "target":
            raise InputError("--set cannot change the target; make another plan")
        if key == "batch_size":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"--set batch_size={value!r}: it is a positive whole number")
            return replace(self, batch_size=value)
        if key == "method":
            return replace(self, method=_method(_text(key, value)))
        if key in _TEXTS:
            text: Any = None if value is None else _text(key, value)
            return replace(self, **{key: text})
        name = key.removeprefix(MODEL)
        if "." in name:
            known = [*_KEYS, "cluster", f"{MODEL}KEY", f"{CLUSTER}KEY"]
            raise InputError(f"--set knows no {key!r}. {_known(key, known)}")
        if ":" in self.target:
            raise InputError(
                f"--set {key} changes a model preset; {self.target} is built by your code"
            )
        return replace(self, model={**self.model, name: value})

    def make_method(self) -> Method:
        """The method.

        Raises:
          InputError: one of the texts means nothing, or the options contradict each other.
        """
        method = make_method(
            self.method, microbatches=self.num_microbatches or "auto", mesh=self.mesh,
            memory_budget=self.memory_budget, schedule=self.schedule, remat=self.remat,
        )  # fmt: skip
        if not self.pins:
            return method
        if self.method not in (MethodName.AUTO, MethodName.SHARD):
            raise InputError(
                f"--pin is for --method auto and --method shard; {self.method.value} prescribes "
                "or searches layouts its own way"
            )
        if not isinstance(method.mesh_shape, Mapping):
            raise InputError("--pin names mesh axes, so --mesh must too: --mesh dp=2,tp=4")
        return ManualParallel(
            {path: parse_spec(text) for path, text in self.pins.items()},
            num_microbatches=method.num_microbatches, mesh_shape=method.mesh_shape,
            memory_budget_bytes=method.memory_budget_bytes,
        )  # fmt: skip

    def load(self) -> tuple[Configuration, Target]:
        """The step, and this configuration with everything that its target decides.

        Raises:
          InputError: there is no such target, or it is not what it should be.
        """
        found = load_target(
            self.target, batch_size=self.batch_size, optimizer=self.optimizer, overrides=self.model
        )
        resolved = replace(
            self, batch_size=found.batch_size, model={**found.settings, **self.model}
        )
        return resolved, found


def change_cluster(cluster: Cluster, key: str, value: Any) -> Cluster:
    """A cluster with another value of one field of its file, such as `cluster.hosts`.

    Raises:
      InputError: there is no such field.
      ClusterError: the value cannot be.
    """
    parts = key.removeprefix(CLUSTER).split(".")
    parts = [_CLUSTER_NAMES.get(parts[0], parts[0]), *parts[1:]]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if parts in (["num_hosts"], ["devices_per_host"]) and whole and value > 0:
        sizes = {"num_hosts": cluster.num_hosts, "devices_per_host": cluster.devices_per_host}
        return cluster.resized(**{**sizes, parts[0]: value})
    data = cluster.to_json()
    at = data
    for i, part in enumerate(parts):
        inside = at.get(part) if isinstance(at, dict) else None
        if inside is None or isinstance(inside, dict) == (i == len(parts) - 1):
            known = [CLUSTER + name for name in [*_CLUSTER_NAMES, *_leaves(data)]]
            raise InputError(f"--set knows no {key!r}. {_known(key, known)}")
        if i == len(parts) - 1:
            at[part] = value
        at = inside
    return Cluster.from_json(data)


def parse_pins(texts: Iterable[str]) -> dict[str, str]:
    """`PATH=P(None, "tp")` pairs: path -> spec, both as text.

    Raises:
      InputError: one has not that form.
    """
    found: dict[str, str] = {}
    for text in texts:
        path, equals, spec = text.partition("=")
        if not equals or not path.strip():
            raise InputError(f'--pin {text!r} has not the form PATH=P(None, "tp")')
        parse_spec(spec)
        found[path.strip()] = spec.strip()
    return found


def parse_spec(text: str) -> PartitionSpec:
    """A `PartitionSpec` from `P(None, "tp", ("dp", "tp"))`.

    Raises:
      InputError: it is something else.
    """
    wrong = InputError(
        f'{text!r} is no layout such as P(None, "tp") or P(("dp", "tp"), None): a dim takes None, '
        "an axis or a tuple of axes"
    )
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.keywords:
            raise wrong
        if ast.unparse(call.func) not in ("P", "PartitionSpec"):
            raise wrong
        dims = [ast.literal_eval(each) for each in call.args]
    except (SyntaxError, ValueError):
        raise wrong from None
    for each in dims:
        names = each if isinstance(each, tuple) else () if each is None else (each,)
        if not all(isinstance(name, str) for name in names):
            raise wrong
    return PartitionSpec(*dims)


def _read(known: dict[str, Any]) -> dict[str, Any]:
    """Options from a plan file, checked."""
    model, pins = {}, {}
    options: dict[str, Any] = {}
    for key, value in known.items():
        if key.startswith(MODEL):
            model[key.removeprefix(MODEL)] = value
        elif key.startswith(PIN):
            pins[key.removeprefix(PIN)] = value
            parse_spec(value if isinstance(value, str) else repr(value))
        elif key == "method":
            options[key] = _method(value)
        elif key == "batch_size":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _odd(key, value, "a positive whole number")
            options[key] = value
        elif key in _TEXTS:
            if not isinstance(value, str):
                raise _odd(key, value, "text")
            options[key] = value
        else:
            raise _odd(key, value, f"no such field; {_known(key, _KEYS)}")
    return {**options, "model": model, "pins": pins}


def _odd(key: str, value: Any, wanted: str) -> InputError:
    return InputError(f"the plan's configuration: {key}: expected {wanted}, found {value!r:.60}")


def _method(name: Any) -> MethodName:
    try:
        return MethodName(name)
    except ValueError:
        known = [each.value for each in MethodName]
        raise InputError(f"there is no method {name!r:.60}. {_known(str(name), known)}") from None


def _text(key: str, value: Any) -> str:
    """A value of `--set` as it was written: `parse_overrides` makes numbers of some."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"--set {key}={value!r} is no text")


def _leaves(data: Mapping[str, Any], above: str = "") -> list[str]:
    """Dotted names of everything in a cluster file that is one value."""
    found = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            if name not in ("sources", "provenance"):
                found += _leaves(value, f"{above}{name}.")
        elif name not in ("format", "version", "curves"):
            found.append(above + name)
    return found


def _known(key: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(key, names, n=3)
    hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."
