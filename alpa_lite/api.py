"""`@parallelize`: the decorator, and the function it makes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from alpa_lite.cost_model import Cluster
from alpa_lite.errors import PlanError, StepError
from alpa_lite.passes.methods import AutoParallel, Method
from alpa_lite.passes.pipeline import PlannedStep, Progress, StepArgs, plan_step, restore
from alpa_lite.passes.pipeline_methods import PipelineMethod
from alpa_lite.passes.pipeline_plan import PipelinePlan
from alpa_lite.passes.pipeshard import PlannedPipeline, plan_pipeline, restore_pipeline
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.plan_cache import PlanCache
from alpa_lite.passes.rules import RuleTable
from alpa_lite.runtime.agreement import agreed, plan_facts, plan_once
from alpa_lite.runtime.arguments import OwnResults, refuse_traced
from alpa_lite.runtime.calling import Argnums, BoundCall, bind_call, signature_of
from alpa_lite.runtime.cluster import attached_cluster
from alpa_lite.runtime.group import process_group
from alpa_lite.runtime.lower import Executable, device_mesh, lower_step, sharding
from alpa_lite.runtime.pipeline import (
    PipelineExecutable,
    compile_pipeline,
    init_on_meshes,
    user_shardings,
)


def parallelize(
    fn: Callable[..., Any] | None = None,
    *,
    method: Method = AutoParallel(),  # noqa: B008  (a frozen value)
    cluster: Cluster | str | None = None,
    batch_argnums: Sequence[int] = (1,),
    donate_argnums: Sequence[int] = (0,),
    static_argnums: Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    plan: Plan | PipelinePlan | None = None,
    plan_cache: str | Path | None = None,
) -> Any:
    """Plan a train step for a cluster and run it sharded.

    The step is an ordinary `step(state, batch, ...) -> (state, aux)` over pytrees. Calling the
    decorated function plans and compiles on first use, then runs; results equal the undecorated
    step's.

    In several processes (`alpa_lite.distributed_initialize`) all of them make the same calls with
    the same arguments: the state as `init` or the latest call returned it, the whole batch as numpy
    arrays. Process 0 plans. What a process returns is on its own devices; `alpa_lite.fetch` brings
    values everywhere.

    Argument numbers are those of `jax.jit`: positions in the signature, negative ones from the last
    argument passed. A method is wrapped once it is bound: `self.step = parallelize(self.step)`.

    Args:
      fn: the step.
      method: how to parallelize; `AutoParallel()` searches everything.
      cluster: the hardware: a `Cluster`, a string such as `"h100:4x8"`, or a JSON file; the
        attached devices by default.
      batch_argnums: arguments whose leaves are split on dim 0.
      donate_argnums: state arguments, returned first and updated in place; `()` for a function
        that returns no state.
      static_argnums: hashable arguments that are compile-time constants.
      static_argnames: further ones by name, such as keyword-only ones.
      plan: run this plan instead of searching. With `cluster`, it must be a plan for that cluster;
        without, it runs on any attached devices of the same number.
      plan_cache: a folder to keep plans in: a step that was planned before, for the same cluster,
        options and versions, is not planned again.

    Raises:
      TypeError: `fn` is not callable, or `method` or `plan` is something else.
      ValueError: `static_argnames` holds a name that `fn` does not take.
      PlanError: `plan` was made for another cluster than `cluster`.

    Example:
      >>> import jax, jax.numpy as jnp, alpa_lite
      >>> @alpa_lite.parallelize(cluster="cpu:1")
      ... def step(w, x):
      ...     loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
      ...     return w - 0.1 * grad, loss
      >>> plan = step.plan(jax.ShapeDtypeStruct((8, 4), "float32"),
      ...                  jax.ShapeDtypeStruct((16, 8), "float32"))
      >>> plan.num_microbatches
      1
    """

    def wrap(function: Callable[..., Any]) -> ParallelStep:
        return ParallelStep(
            function, method=method, cluster=cluster, batch_argnums=batch_argnums,
            donate_argnums=donate_argnums, static_argnums=static_argnums,
            static_argnames=static_argnames, plan=plan, plan_cache=plan_cache,
        )  # fmt: skip

    return wrap if fn is None else wrap(fn)


class ParallelStep:
    """A train step that plans, compiles and runs itself; made by `parallelize`."""

    def __init__(
        self, fn: Callable[..., Any], *, method: Method, cluster: Cluster | str | None,
        batch_argnums: Sequence[int], donate_argnums: Sequence[int],
        static_argnums: Sequence[int], static_argnames: str | Sequence[str],
        plan: Plan | PipelinePlan | None, plan_cache: str | Path | None,
    ) -> None:  # fmt: skip
        if not callable(fn):
            raise TypeError(
                f"parallelize takes a function, found {fn!r} of type {type(fn).__name__}; options "
                "are passed by name, as in parallelize(step, method=...)"
            )
        if not isinstance(method, Method):
            raise TypeError(f"method must be a Method such as AutoParallel(), found {method!r}")
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._signature = signature_of(fn)
        self._name = getattr(fn, "__name__", type(fn).__name__)
        self._method = method
        self._cluster = None if cluster is None else Cluster.resolve(cluster)
        self._argnums = Argnums(
            batch=_as_tuple(batch_argnums),
            donate=_as_tuple(donate_argnums),
            static=_as_tuple(static_argnums),
            static_names=_checked_names(static_argnames, self._signature),
        )
        self._given_plan = _checked_plan(plan, self._cluster)
        self._cache = None if plan_cache is None else PlanCache(Path(plan_cache))
        self._rules = RuleTable()
        self._plan_files: dict[Any, Path] = {}
        self._planned: dict[Any, PlannedStep | PlannedPipeline] = {}
        self._executables: dict[Any, Executable | PipelineExecutable] = {}
        self._own = OwnResults()
        self._last: tuple[PlannedStep | PlannedPipeline, tuple[int, ...]] | None = None
        """The latest plan, and where its state stands among the arguments that are not static."""

    def __get__(self, instance: Any, owner: type | None = None) -> ParallelStep:
        """Refuse to be a method: nothing here takes `self`."""
        if instance is None:
            return self
        raise TypeError(
            f"a parallelized step is no method and takes no self, found {self._name!r} on a "
            f"{type(instance).__name__}. Decorate it after it is bound, in __init__: "
            f"self.{self._name} = parallelize(self.{self._name}); or make it a staticmethod."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step, planning and compiling it first if these shapes are new."""
        call = bind_call(self._signature, self._argnums, args, kwargs)
        leaves = jax.tree.leaves(call.dynamic)
        refuse_traced(leaves, call.leaf_names, self._name)
        return self._compile(call).run(leaves)

    def plan(
        self, *args: Any, progress: Progress | None = None, **kwargs: Any
    ) -> Plan | PipelinePlan:
        """The plan for these arguments; shapes will do, no device is needed.

        Args:
          *args: the step's arguments.
          progress: called with what is being done and the fraction done.
          **kwargs: the step's keyword arguments.

        Raises:
          InfeasibleError: nothing fits the memory.
          StepError: the step does not return its state first.
        """
        call = bind_call(self._signature, self._argnums, args, kwargs)
        key = call.key()
        if key not in self._planned and self._given_plan is None and process_group() is None:
            found = self._cached(self._step_args(call), key)
            if found is not None:
                return found
        return self._plan(call, key, progress).plan

    def compile(self, *args: Any, **kwargs: Any) -> Executable | PipelineExecutable:
        """The compiled program for these arguments, on the attached devices."""
        return self._compile(bind_call(self._signature, self._argnums, args, kwargs))

    def init(self, init_fn: Callable[..., Any], *args: Any) -> Any:
        """Create the state already sharded: `init_fn` runs on the devices, nothing is copied.

        Args:
          init_fn: returns the state: the step's donated argument, or a tuple of them if there are
            several; the first argument if none is donated.
          *args: arguments of `init_fn`. If no plan has been made yet, the step's other arguments
            (the batch) are taken from the end of `args`: both `init(init_fn, key, batch)` with
            `init_fn(key)` and with `init_fn(key, batch)` work.

        Raises:
          StepError: no plan exists and the batch is not among `args`, or `init_fn` returns another
            structure, shape or dtype than the state was planned with.
        """
        if self._last is None:
            args = self._plan_for_init(init_fn, args)
        assert self._last is not None
        planned, state = self._last
        leaves, tree = jax.tree.flatten(jax.eval_shape(init_fn, *args))
        if isinstance(planned, PlannedPipeline):
            step = planned.source.traced
        else:
            step = planned.decisions.contraction.program.step
        trees = [step.in_tree.children()[i] for i in state]
        expected = trees[0] if len(trees) == 1 else jax.tree_util.treedef_tuple(trees)
        if tree != expected:
            raise StepError(f"init_fn returns {tree}; the step was planned for a state {expected}")
        positions = [p for i in state for p in step.argument_range(i)]
        for leaf, position in zip(leaves, positions, strict=True):
            value = step.graph.values[step.graph.inputs[position]]
            if (leaf.shape, leaf.dtype) != (value.shape, value.dtype):
                raise StepError(
                    f"init_fn must return the state that the step was planned for: "
                    f"{step.graph.input_names[position]} should be "
                    f"{value.dtype}{list(value.shape)}, found {leaf.dtype}{list(leaf.shape)}. "
                    "Change init_fn, or plan for its state: .plan(state_shapes, batch)"
                )
        if isinstance(planned, PlannedPipeline):
            found = user_shardings(planned)
            return init_on_meshes(init_fn, args, [found[p] for p in positions])
        mesh, specs = device_mesh(planned.plan.mesh), list(planned.plan.inputs.values())
        shardings = jax.tree.unflatten(tree, [sharding(mesh, specs[p]) for p in positions])
        return jax.jit(init_fn, out_shardings=shardings)(*args)

    def _plan_for_init(self, init_fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Plan from what `init` was given; returns the arguments that are `init_fn`'s own."""
        parameters = () if self._signature is None else self._signature.parameters.values()
        required = [
            p
            for p in parameters
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        state = sorted({n % max(1, len(required)) for n in self._argnums.donate} or {0})
        num_others = len(required) - len(state)
        if len(args) < num_others:
            raise StepError(
                "init needs a plan: call .plan(state_shapes, batch) first, or pass the batch after "
                "init_fn's own arguments"
            )
        others = args[len(args) - num_others :]
        own = args[: len(args) - num_others]
        try:
            inspect.signature(init_fn).bind(*own)
        except TypeError:
            own = args
        made = jax.eval_shape(init_fn, *own)
        parts = (made,) if len(state) == 1 else tuple(made)
        values = list(others)
        for position, part in zip(state, parts, strict=True):
            values.insert(position, part)
        call = bind_call(self._signature, self._argnums, tuple(values), {})
        self._plan(call, call.key(), None)
        return own

    def _compile(self, call: BoundCall) -> Executable | PipelineExecutable:
        key = call.key()
        if key not in self._executables:
            planned = self._plan(call, key, None)
            leaves = [jax.tree.leaves(a) for a in call.dynamic]
            starts = [sum(map(len, leaves[:i])) for i in range(len(leaves))]
            donated = self._step_args(call).donate_argnums
            donate = [starts[a] + i for a in donated for i in range(len(leaves[a]))]
            avals = call.avals(jax.tree.leaves(call.dynamic))
            if isinstance(planned, PlannedPipeline):
                self._executables[key] = compile_pipeline(planned, avals, own=self._own)
            else:
                self._executables[key] = lower_step(planned, avals, donate, own=self._own)
        return self._executables[key]

    def _plan(
        self, call: BoundCall, key: Any, progress: Progress | None
    ) -> PlannedStep | PlannedPipeline:
        step = self._step_args(call)
        if key not in self._planned:
            self._planned[key] = self._make_plan(step, key, progress)
        self._last = self._planned[key], step.donate_argnums or (0,)
        return self._planned[key]

    def _make_plan(
        self, step: StepArgs, key: Any, progress: Progress | None
    ) -> PlannedStep | PlannedPipeline:
        """In several processes: planned by one of them, and compared."""
        method, given, table, group = self._method, self._given_plan, self._rules, process_group()
        staged = method if isinstance(method, PipelineMethod) else PipelineMethod()

        def search() -> PlannedStep | PlannedPipeline:
            found = self._cached(step, key)
            if found is not None:
                return rebuild(found)
            cluster = self._cluster or attached_cluster()
            planned: PlannedStep | PlannedPipeline
            if isinstance(method, PipelineMethod):
                planned = plan_pipeline(step, method, cluster, table=table, progress=progress)
            else:
                planned = plan_step(step, method, cluster, table=table, progress=progress)
            if self._cache is not None:
                self._cache.save(self._plan_files[key], planned.plan)
            return planned

        def rebuild(plan: Plan | PipelinePlan) -> PlannedStep | PlannedPipeline:
            if isinstance(plan, PipelinePlan):
                return restore_pipeline(plan, step, staged, table=table)
            return restore(plan, step, method, table=table)

        def make() -> PlannedStep | PlannedPipeline:
            if given is not None:
                return rebuild(given)
            return search() if group is None else plan_once(group, search, rebuild)

        if group is None:
            return make()
        return agreed(group, f"planning {step.name}", make, lambda made: plan_facts(made.plan))

    def _cached(self, step: StepArgs, key: Any) -> Plan | PipelinePlan | None:
        """The plan that was made for this step before."""
        if self._cache is None:
            return None
        if key not in self._plan_files:
            cluster = self._cluster or attached_cluster()
            self._plan_files[key] = self._cache.path(step, self._method, cluster)
        return self._cache.load(self._plan_files[key])

    def _step_args(self, call: BoundCall) -> StepArgs:
        """The step with static arguments bound, and positions among the dynamic ones."""
        dynamic = call.dynamic_positions
        return StepArgs(
            fun=_bind_static(self._fn, call), args=call.dynamic,
            arg_names=tuple(call.names[i] for i in dynamic),
            batch_argnums=tuple(dynamic.index(i) for i in call.batch),
            donate_argnums=tuple(dynamic.index(i) for i in call.donate),
            name=self._name,
        )  # fmt: skip


def _bind_static(fn: Callable[..., Any], call: BoundCall) -> Callable[..., Any]:
    """`fn` of the dynamic arguments alone, in their order in the call."""
    static = {i: call.values[i] for i in call.static}
    dynamic, count = call.dynamic_positions, call.num_positional
    keywords = call.names[count:]

    @functools.wraps(fn)
    def bound(*values: Any) -> Any:
        given = dict(zip(dynamic, values, strict=True)) | static
        named = {name: given[count + i] for i, name in enumerate(keywords)}
        return fn(*(given[i] for i in range(count)), **named)

    return bound


def _checked_names(
    names: str | Sequence[str], signature: inspect.Signature | None
) -> tuple[str, ...]:
    """`static_argnames`, if the step takes such arguments."""
    found = (names,) if isinstance(names, str) else tuple(names)
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"static_argnames must be names of arguments, found {name!r}")
    parameters = {} if signature is None else signature.parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in found if name not in parameters]
    if unknown and signature is not None and not open_ended:
        raise ValueError(
            f"static_argnames names {unknown[0]!r}, but the step takes {', '.join(parameters)}"
        )
    return found


def _checked_plan(plan: Any, cluster: Cluster | None) -> Plan | PipelinePlan | None:
    """The plan, if it is one and was made for this cluster.

    Without a cluster any will do: running a plan for other hardware on attached virtual devices is
    how it is tried out.
    """
    if plan is None:
        return None
    if not isinstance(plan, Plan | PipelinePlan):
        reader = "Plan.from_json(data)" if isinstance(plan, dict) else "load_plan(path)"
        raise TypeError(
            f"plan must be a Plan, found {plan!r:.80} of type {type(plan).__name__}; read it with "
            f"alpa_lite.{reader}"
        )
    if cluster is not None and _hardware(cluster) != _hardware(plan.cluster):
        raise PlanError(
            f"the plan {plan.name!r} was made for {_show(plan.cluster)} devices, not for "
            f"{_show(cluster)}; plan again for that cluster, or drop cluster= to run the plan on "
            "the attached devices"
        )
    return plan


def _hardware(cluster: Cluster) -> tuple[int, int, str]:
    return cluster.num_hosts, cluster.devices_per_host, cluster.device.name


def _show(cluster: Cluster) -> str:
    return (
        f"{cluster.name}, {cluster.device.name}: {cluster.num_hosts} x {cluster.devices_per_host}"
    )


def _as_tuple(numbers: int | Sequence[int]) -> tuple[int, ...]:
    return (numbers,) if isinstance(numbers, int) else tuple(numbers)
