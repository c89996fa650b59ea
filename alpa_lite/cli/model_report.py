"""The figures of `alpa-lite model`: JSON-ready values, and the tables that show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Console

from alpa_lite.cli.output import make_table
from alpa_lite.cli.traced_flops import TracedFlops
from alpa_lite.cost_model.llm import (
    TransformerShape,
    activation_bytes,
    count_flops,
    count_parameters,
    kv_cache_bytes,
    recomputed_flops,
)
from alpa_lite.cost_model.llm.shape import PARTS, active_parameters
from alpa_lite.cost_model.memory import RECIPES, Recipe

REMATS: Final = ("none", "dots", "full")
CACHE_BYTES_PER_ELEMENT: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A measured train step.

    Attributes:
      step_s: seconds.
      num_devices: that worked on it.
      peak_flops_per_s: of one device.
      remat: what the backward pass computed again.
    """

    step_s: float
    num_devices: int
    peak_flops_per_s: float
    remat: str


def model_report(
    shape: TransformerShape, *, batch: int, seq: int, measured: Measured | None,
    traced: TracedFlops | None,
) -> dict[str, Any]:  # fmt: skip
    """Every figure, by name and unit."""
    parameters = count_parameters(shape)
    total = sum(parameters.values())
    report: dict[str, Any] = {
        "name": shape.name,
        "batch": batch,
        "seq": seq,
        "parameters": {
            **parameters, "total": total, "used_per_token": active_parameters(shape),
        },
        "flops": _flops(shape, batch, seq),
        "memory_bytes": {
            "state": {recipe.name: _state_bytes(total, recipe) for recipe in RECIPES},
            "activations": {
                remat: activation_bytes(shape, batch=batch, seq=seq, remat=remat)
                for remat in REMATS
            },
            "kv_cache_per_token": kv_cache_bytes(
                shape, batch=1, seq=1, bytes_per_element=CACHE_BYTES_PER_ELEMENT
            ),
            "kv_cache": kv_cache_bytes(
                shape, batch=batch, seq=seq, bytes_per_element=CACHE_BYTES_PER_ELEMENT
            ),
        },
    }  # fmt: skip
    if measured is not None:
        report["utilisation"] = _utilisation(shape, batch, seq, measured)
    if traced is not None:
        report["traced"] = _compared(shape, batch, seq, traced)
    return report


def _flops(shape: TransformerShape, batch: int, seq: int) -> dict[str, Any]:
    parts = count_flops(shape, batch=batch, seq=seq, embedding_as_matmul=True)
    lookup = count_flops(shape, batch=batch, seq=seq)
    causal = count_flops(shape, batch=batch, seq=seq, causal=True)
    training = sum(part.training for part in parts.values())
    return {
        "forward": {name: part.forward for name, part in lookup.items()},
        "forward_total": sum(part.forward for part in lookup.values()),
        "training": {name: part.training for name, part in parts.items()},
        "training_total": training,
        "training_share": {name: part.training / training for name, part in parts.items()},
        "model": sum(part.training for part in lookup.values()),
        "model_causal": sum(part.training for part in causal.values()),
    }


def _state_bytes(parameters: int, recipe: Recipe) -> dict[str, int]:
    return {
        "master": parameters * recipe.master_bytes,
        "gradient": parameters * recipe.gradient_bytes,
        "running": parameters * recipe.running_bytes,
        "moments": parameters * sum(recipe.moment_bytes),
        "total": parameters * recipe.bytes_per_parameter,
    }


def _utilisation(
    shape: TransformerShape, batch: int, seq: int, measured: Measured
) -> dict[str, Any]:
    available = measured.step_s * measured.num_devices * measured.peak_flops_per_s
    found = asdict(measured)
    for name, causal in (("", False), ("_causal", True)):
        parts = count_flops(shape, batch=batch, seq=seq, causal=causal)
        model = sum(part.training for part in parts.values())
        again = recomputed_flops(shape, batch=batch, seq=seq, remat=measured.remat, causal=causal)
        found[f"mfu{name}"] = model / available
        found[f"hfu{name}"] = (model + again) / available
    found["tokens_per_s_per_device"] = batch * seq / measured.step_s / measured.num_devices
    return found


def _compared(shape: TransformerShape, batch: int, seq: int, traced: TracedFlops) -> dict[str, Any]:
    parts = count_flops(shape, batch=batch, seq=seq).values()
    matmul = sum(part.training_matmul for part in parts)
    total = sum(part.training for part in parts)
    return {
        **asdict(traced),
        "matmul_closed_form": matmul,
        "matmul_difference": matmul / traced.matmul - 1,
        "total_closed_form": total,
        "total_difference": total / (traced.matmul + traced.other) - 1,
    }


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """The tables for people."""
    _print_parts(console, report)
    _print_memory(console, report)
    if "utilisation" in report:
        _print_utilisation(console, report["utilisation"])
    if "traced" in report:
        _print_traced(console, report["traced"])


def _print_parts(console: Console, report: Mapping[str, Any]) -> None:
    flops, parameters = report["flops"], report["parameters"]
    rows = [
        (
            part, f"{parameters[part]:,}", _tera(flops["forward"][part]),
            _tera(flops["training"][part]), f"{flops['training_share'][part]:.3%}",
        )
        for part in PARTS
    ]  # fmt: skip
    rows.append(
        (
            "total", f"{parameters['total']:,}", _tera(flops["forward_total"]),
            _tera(flops["training_total"]), "",
        )
    )  # fmt: skip
    header = ("part", "parameters", "forward TFLOP", "training TFLOP", "share of training")
    batch, seq = report["batch"], report["seq"]
    title = f"{report['name']}, {batch} x {seq} tokens"
    console.print(make_table(title, header, rows, right=range(1, 5)))
    used = parameters["used_per_token"]
    if used != parameters["total"]:
        console.print(f"A token uses {used:,} parameters.")
    console.print(
        "Training counts the embedding like a matrix product, as is customary; without, and as "
        f"utilisation is counted, {_tera(flops['model'])} TFLOP, or "
        f"{_tera(flops['model_causal'])} with causal scores only. RoPE is among the residuals."
    )


def _print_memory(console: Console, report: Mapping[str, Any]) -> None:
    memory = report["memory_bytes"]
    header = ("recipe", "master", "gradient", "running copy", "moments", "total GB")
    keys = ("master", "gradient", "running", "moments", "total")
    rows = [
        (name, *(f"{sizes[key] / 1e9:,.1f}" for key in keys))
        for name, sizes in memory["state"].items()
    ]
    console.print(make_table("State in GB", header, rows, right=range(1, 6)))
    for recipe in RECIPES:
        if recipe.note:
            console.print(f"{recipe.name}: {recipe.note}.")
    kept = ", ".join(
        f"{size / 1e9:,.2f} GB with remat {remat}" for remat, size in memory["activations"].items()
    )
    console.print(f"Activations of all blocks, 16 bit, fused attention: {kept}.")
    console.print(
        f"Key-value cache, 16 bit: {memory['kv_cache_per_token'] / 1e3:,.1f} kB per token, "
        f"{memory['kv_cache'] / 1e9:,.2f} GB for {report['batch']} x {report['seq']} tokens."
    )


def _print_utilisation(console: Console, found: Mapping[str, Any]) -> None:
    peak = found["peak_flops_per_s"] / 1e12
    console.print(
        f"{found['step_s']:g} s on {found['num_devices']} devices of {peak:,.0f} TFLOP/s, remat "
        f"{found['remat']}: MFU {found['mfu']:.1%}, HFU {found['hfu']:.1%}; with causal scores "
        f"only MFU {found['mfu_causal']:.1%}, HFU {found['hfu_causal']:.1%}; "
        f"{found['tokens_per_s_per_device']:,.0f} tokens/s per device."
    )


def _print_traced(console: Console, found: Mapping[str, Any]) -> None:
    console.print(
        f"The traced step: {_tera(found['matmul'])} TFLOP in matrix products (closed form "
        f"{found['matmul_difference']:+.3%}; the one-hot products that build the dispatch of "
        "experts are left out there), "
        f"{_tera(found['other'])} in everything else (one per element and operation, masks, "
        f"conversions and the loss included; with it the closed form is "
        f"{found['total_difference']:+.3%}), {_tera(found['update'])} in the optimizer."
    )


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.2f}"
