"""What a person would write by hand: `jax.jit` of a train step with the usual shardings.

Layouts of parameters follow from their paths and shapes; optimizer state follows its parameter, and
XLA's partitioner does the rest. Used by `regret` to compare with.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alpa_lite.runtime.lower import compiler_options

Shape = tuple[int, ...]
SpecOf = Callable[[str, Shape], P]

# Megatron-LM's pairs of column- and row-parallel products (arXiv 1909.08053), by path pattern: the
# dim to split. Experts are spread over the devices, the vocabulary is split.
MEGATRON: Mapping[str, int] = {
    "*/attention/query/kernel*": 1,
    "*/attention/key/kernel*": 1,
    "*/attention/value/kernel*": 1,
    "*/attention/query/bias*": 0,
    "*/attention/key/bias*": 0,
    "*/attention/value/bias*": 0,
    "*/attention/out/kernel*": 0,
    "*/mlp/up/kernel*": 1,
    "*/mlp/up/bias*": 0,
    "*/mlp/gate/kernel*": 1,
    "*/mlp/down/kernel*": 0,
    "*/experts/up*": 0,
    "*/experts/down*": 0,
    "embed/embedding*": 0,
    "head/kernel*": 1,
}
# Output channels of convolutions and of the classifier.
CONV_CHANNELS: Mapping[str, int] = {"*conv*/kernel*": 3, "head/kernel*": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One way to lay out a train step by hand.

    Attributes:
      name: what people call it.
      mesh_axes: name -> size.
      batch_axes: mesh axes that split the batch.
      spec_of: (path of a parameter, shape) -> its spec.
    """

    name: str
    mesh_axes: Mapping[str, int]
    batch_axes: tuple[str, ...]
    spec_of: SpecOf


def data_parallel_spec(path: str, shape: Shape) -> P:
    """Replicated."""
    return P()


def fsdp_spec(path: str, shape: Shape, *, size: int, axis: str) -> P:
    """The largest dim that divides, else replicated."""
    fitting = [d for d in range(len(shape)) if shape[d] % size == 0]
    if not fitting:
        return P()
    return _on_dim(max(fitting, key=lambda d: shape[d]), axis)


def pattern_spec(
    path: str, shape: Shape, *, patterns: Mapping[str, int], size: int, axis: str
) -> P:
    """The dim of the first pattern that matches the path, if it divides, else replicated."""
    for pattern, dim in patterns.items():
        if fnmatch.fnmatchcase(path, pattern):
            return _on_dim(dim, axis) if shape[dim] % size == 0 else P()
    return P()


def baselines(patterns: Mapping[str, int], num_devices: int = 8) -> list[Baseline]:
    """Data parallel, FSDP, tensor parallel, and data with tensor parallel."""

    def tensor(size: int) -> SpecOf:
        return lambda p, s: pattern_spec(p, s, patterns=patterns, size=size, axis="tp")

    inner = num_devices // 2
    return [
        Baseline(
            name="data parallel", mesh_axes={"dp": num_devices}, batch_axes=("dp",),
            spec_of=data_parallel_spec,
        ),
        Baseline(
            name="FSDP", mesh_axes={"dp": num_devices}, batch_axes=("dp",),
            spec_of=lambda p, s: fsdp_spec(p, s, size=num_devices, axis="dp"),
        ),
        Baseline(
            name="tensor parallel", mesh_axes={"tp": num_devices}, batch_axes=(),
            spec_of=tensor(num_devices),
        ),
        Baseline(
            name=f"data x tensor parallel, 2x{inner}", mesh_axes={"dp": 2, "tp": inner},
            batch_axes=("dp",), spec_of=tensor(inner),
        ),
    ]  # fmt: skip


def state_specs(state: Any, spec_of: SpecOf) -> Any:
    """Specs of a train state: optimizer state like the parameter it belongs to, the rest whole.

    A leaf belongs to a parameter if its path ends with the parameter's and their shapes agree.
    """
    tree = state["params"] if isinstance(state, dict) else state.params
    params = {_path(p): x.shape for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}

    def spec(path: Any, leaf: Any) -> P:
        name = _path(path)
        for param, shape in params.items():
            if (name == param or name.endswith(f"/{param}")) and leaf.shape == shape:
                return spec_of(param, shape)
        return P()

    return jax.tree_util.tree_map_with_path(spec, state)


def compile_baseline(baseline: Baseline, step: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
    """(compiled step with donated state, shardings of the state, shardings of the batch)."""
    sizes = tuple(baseline.mesh_axes.values())
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    mesh = Mesh(devices, tuple(baseline.mesh_axes))
    specs = state_specs(state, baseline.spec_of)
    of_state = jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P)
    )
    of_batch = jax.tree.map(lambda _: NamedSharding(mesh, P(baseline.batch_axes or None)), batch)
    jitted = jax.jit(
        step, in_shardings=(of_state, of_batch), out_shardings=(of_state, None), donate_argnums=0,
        compiler_options=compiler_options(devices.flat[0].platform),
    )  # fmt: skip
    return jitted.lower(state, batch).compile(), of_state, of_batch


def _on_dim(dim: int, axis: str) -> P:
    return P(*(None,) * dim, axis)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
