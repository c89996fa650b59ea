"""What `alpa-lite plan` plans: a model preset, or the user's own step."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from alpa_lite.api import ParallelStep
from alpa_lite.cli.exits import InputError
from alpa_lite.models import ModelSetup, build


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A step and the shapes it is planned for.

    Attributes:
      name: as given.
      step: `step(state, batch) -> (state, aux)`, undecorated.
      state, batch: pytrees of `jax.ShapeDtypeStruct`s or arrays.
      batch_size: of `batch`; None if its leaves differ.
      settings: of a model preset; empty for the user's own step.
    """

    name: str
    step: Callable[..., Any]
    state: Any
    batch: Any
    batch_size: int | None
    settings: Mapping[str, Any] = field(default_factory=dict)


def load_target(
    text: str, *, batch_size: int | None, optimizer: str | None, overrides: Mapping[str, Any]
) -> Target:
    """A preset's step, or what `package.module:factory` returns.

    Args:
      text: a name from `alpa-lite models`, or module and factory. `factory()` returns a
        `ModelSetup` or `(step, state_shapes, batch_shapes)`.
      batch_size: sequences or images per step, over all devices.
      optimizer: of a preset; its default if None.
      overrides: changed settings of a preset.

    Raises:
      InputError: there is no such thing, or it is not what it should be.
    """
    if ":" not in text:
        setup = build_setup(text, optimizer, overrides)
        return replace(_of_setup(text, setup, batch_size), settings=asdict(setup.config))
    if optimizer is not None or overrides:
        raise InputError(
            f"--optimizer and --set change model presets; {text} is built by your code"
        )
    found = import_factory(text)()
    if isinstance(found, ModelSetup):
        return _of_setup(text, found, batch_size)
    return _of_tuple(text, found, batch_size)


def build_setup(name: str, optimizer: str | None, overrides: Mapping[str, Any]) -> ModelSetup:
    """A preset with changed settings.

    Raises:
      InputError: the preset, a setting or a value is unknown.
    """
    taken = sorted({"name", "optimizer"} & set(overrides))
    if taken:
        raise InputError(f"--set cannot change {taken[0]}; give the preset or --optimizer instead")
    options = dict(overrides) if optimizer is None else {"optimizer": optimizer, **overrides}
    try:
        return build(name, **options)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None


def import_factory(text: str) -> Callable[[], Any]:
    """The function behind `package.module:factory`; modules of the working folder count too.

    Raises:
      InputError: the module or the function does not exist. Errors inside the module are its own.
    """
    module_name, _, function_name = text.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise InputError(f"{text!r} has not the form package.module:factory")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise
        raise InputError(
            f"there is no module {missing!r} for {text}; run where it can be imported"
        ) from None
    factory = getattr(module, function_name, None)
    if not callable(factory):
        functions = [
            name
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if function.__module__ == module_name and not name.startswith("_")
        ]
        raise InputError(
            f"{module_name} has no function {function_name!r}; it has "
            f"{', '.join(functions) or 'none'}"
        )
    return factory


def _of_setup(text: str, setup: ModelSetup, batch_size: int | None) -> Target:
    if batch_size is None:
        raise InputError(f"{text} can be planned for any batch; say which: --batch-size N")
    return Target(
        name=text, step=setup.step, state=setup.state_shapes(),
        batch=setup.batch_shapes(batch_size), batch_size=batch_size,
    )  # fmt: skip


def _of_tuple(text: str, found: Any, batch_size: int | None) -> Target:
    if not isinstance(found, tuple) or len(found) != 3 or not callable(found[0]):
        raise InputError(
            f"{text} returned {type(found).__name__}; it must return a ModelSetup or "
            "(step, state_shapes, batch_shapes)"
        )
    step, state, batch = found
    if isinstance(step, ParallelStep):
        raise InputError(
            f"{text} returned a step that is parallelized already; return the plain one"
        )
    shapes = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves((state, batch))]
    if not shapes or None in shapes:
        raise InputError(
            f"{text}: state_shapes and batch_shapes must hold arrays or jax.ShapeDtypeStructs"
        )
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape}
    if batch_size is not None and sizes != {batch_size}:
        found_sizes = " and ".join(map(str, sorted(sizes))) or "no leaf"
        raise InputError(
            f"{text} returns batch shapes for {found_sizes}, not for --batch-size {batch_size}; "
            "leave the option out, or return a ModelSetup"
        )
    size = sizes.pop() if len(sizes) == 1 else None
    return Target(name=text, step=step, state=state, batch=batch, batch_size=size)
