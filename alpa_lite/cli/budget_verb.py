"""`alpa-lite budget`: what to train with so much compute, how, how long and for how much.

Starts no device.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final

import jax
import typer
from rich.console import Console

from alpa_lite.cli.budget_plan import best_grid
from alpa_lite.cli.budget_shape import BASE, nearest_sizes, parameters_of, shape_with
from alpa_lite.cli.exits import InputError
from alpa_lite.cli.options import JsonOption
from alpa_lite.cli.output import Report, make_table, print_json, progress_bar, stdout_console
from alpa_lite.cli.target import build_setup
from alpa_lite.cost_model import Cluster
from alpa_lite.cost_model.llm import count_flops
from alpa_lite.cost_model.llm.scaling import (
    FLOPS_PER_PARAMETER_AND_TOKEN,
    SCALING_LAWS,
    ComputeOptimum,
    compute_optimum,
)

DAY_S: Final = 86_400.0
DTYPE: Final = "bfloat16"
TOKENS_PER_STEP: Final = 4 * 2**20  # 4 M tokens, the scale of Llama 2 and 3


def budget(
    flops: Annotated[
        float | None, typer.Option(metavar="N", help="Training operations, such as 1e24.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Devices, with --days.")
    ] = None,
    days: Annotated[float | None, typer.Option(metavar="N", help="They can be used for.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="CLUSTER",
            help="The hardware, such as h100:64x8; needed for --gpus, and for a plan.",
        ),
    ] = None,
    mfu: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Of the peak rate that --gpus and --days are taken to reach."
        ),
    ] = 0.4,
    price: Annotated[
        float | None, typer.Option(metavar="PRICE", help="Of one device for one hour.")
    ] = None,
    law: Annotated[str, typer.Option(help=f"Scaling law: {', '.join(SCALING_LAWS)}.")] = "hoffmann",
    seq: Annotated[int, typer.Option(min=1, max=2**20, metavar="TOKENS", help="Sequence.")] = 4096,
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Sequences per step; 4 M tokens.")
    ] = None,
    plan_seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="For the search of the plan; 0 for no plan.")
    ] = 60.0,
    json: JsonOption = False,
) -> None:
    """Find the best model for a budget of compute, its plan, the days it takes and what it costs.

    A scaling law gives parameters and tokens; the nearest Llama-like model is planned for the
    cluster. Exits with 2 if no plan of that model fits and with 3 on bad input. With --json the
    output is an object with flops, law, optimum, model, and plan where a cluster is given.
    """
    hardware = None if cluster is None else Cluster.resolve(cluster)
    _check(law, mfu, price, plan_seconds, hardware)
    available = _operations(flops, gpus, days, hardware, mfu)
    best = compute_optimum(available, SCALING_LAWS[law])
    sizes = nearest_sizes(best.parameters)
    parameters = parameters_of(sizes)
    tokens = available / (FLOPS_PER_PARAMETER_AND_TOKEN * parameters)
    sequences = batch_size or max(1, 2 ** round(math.log2(TOKENS_PER_STEP / seq)))
    found: dict[str, Any] = {
        "flops": available,
        "law": {"name": law, "source": SCALING_LAWS[law].source},
        "optimum": _optimum(best),
        "model": {
            "base": BASE, **sizes, "parameters": parameters, "tokens": tokens,
            "loss": SCALING_LAWS[law].loss(parameters, tokens), "seq_len": seq,
            "batch_size": sequences, "steps": math.ceil(tokens / (sequences * seq)),
        },
    }  # fmt: skip
    if hardware is not None and plan_seconds:
        # Shapes are all that planning needs: accelerators are left alone.
        jax.config.update("jax_platforms", "cpu")
        with progress_bar() as report:
            found["plan"] = _plan(found["model"], sizes, hardware, plan_seconds, price, report)
    if json:
        print_json(found)
    else:
        _print(stdout_console(), found)


def _check(
    law: str, mfu: float, price: float | None, plan_seconds: float, hardware: Cluster | None
) -> None:
    if law not in SCALING_LAWS:
        raise InputError(f"--law {law!r} is none of {', '.join(SCALING_LAWS)}")
    if not 0 < mfu <= 1:
        raise InputError(f"--mfu {mfu:g} is not a share above 0 and up to 1")
    if price is not None and not 0 <= price < math.inf:
        raise InputError(f"--price {price:g} is not a price per hour of one device")
    if price is not None and hardware is None:
        raise InputError("--price needs --cluster: without, there are no days to pay for")
    if not 0 <= plan_seconds < math.inf:
        raise InputError(f"--plan-seconds {plan_seconds:g} is not a number of seconds")


def _operations(
    flops: float | None, gpus: int | None, days: float | None, hardware: Cluster | None, mfu: float
) -> float:
    """Training operations that can be afforded."""
    if flops is not None:
        if gpus is not None or days is not None:
            raise InputError("give --flops, or --gpus and --days, not both")
        if not 1e15 <= flops <= 1e30:
            raise InputError(f"--flops {flops:g} is not between 1e15 and 1e30")
        return flops
    if gpus is None or days is None or hardware is None:
        raise InputError(
            "give --flops 1e24, or --gpus, --days and --cluster: --gpus 512 --days 30 --cluster "
            "h100:64x8"
        )
    if not 0 < days <= 36500:
        raise InputError(f"--days {days:g} is not above 0 and up to 36500")
    if gpus != hardware.num_devices:
        raise InputError(f"--gpus {gpus} and --cluster with {hardware.num_devices} devices differ")
    return gpus * days * DAY_S * mfu * hardware.device.peak_flops_per_s(DTYPE)


def _optimum(best: ComputeOptimum) -> dict[str, float]:
    return {
        "parameters": best.parameters,
        "tokens": best.tokens,
        "tokens_per_parameter": best.tokens / best.parameters,
        "loss": best.loss,
    }


def _plan(
    model: dict[str, Any], sizes: dict[str, int], hardware: Cluster, seconds: float,
    price: float | None, report: Report,
) -> dict[str, Any]:  # fmt: skip
    """What the planner says about training the model on the cluster."""
    setups = {
        remat: build_setup(
            BASE, None,
            {**sizes, "seq_len": model["seq_len"], "scan_layers": True, "remat": remat == "full"},
        )
        for remat in ("none", "full")
    }  # fmt: skip
    remat, method, plan = best_grid(setups, model["batch_size"], hardware, seconds, report)
    step_s = plan.predicted.step_s
    parts = count_flops(shape_with(sizes), batch=model["batch_size"], seq=model["seq_len"])
    peak = hardware.num_devices * hardware.device.peak_flops_per_s(DTYPE)
    days = model["steps"] * step_s / DAY_S
    return {
        "cluster": hardware.name,
        "num_devices": hardware.num_devices,
        "dp": method.dp,
        "tp": method.tp,
        "pp": method.pp,
        "num_microbatches": plan.num_microbatches,
        "remat": remat,
        "peak_bytes": plan.predicted.peak_bytes,
        "step_s": step_s,
        "mfu": sum(part.training for part in parts.values()) / (step_s * peak),
        "days": days,
        "device_hours": days * 24 * hardware.num_devices,
        "cost": None if price is None else days * 24 * hardware.num_devices * price,
    }


def _print(console: Console, found: dict[str, Any]) -> None:
    best, model = found["optimum"], found["model"]
    rows = [
        ("training operations", f"{found['flops']:.3g}"),
        ("best parameters", f"{best['parameters'] / 1e9:,.3g} B"),
        ("best tokens", f"{best['tokens'] / 1e9:,.4g} B, {best['tokens_per_parameter']:.3g} each"),
        ("predicted loss", f"{best['loss']:.3f}"),
        (
            "nearest model",
            f"{model['parameters'] / 1e9:,.3g} B: hidden_size={model['hidden_size']} "
            f"mlp_size={model['mlp_size']} num_layers={model['num_layers']} "
            f"num_heads={model['num_heads']} num_kv_heads={model['num_kv_heads']}",
        ),
        ("its tokens and loss", f"{model['tokens'] / 1e9:,.4g} B, {model['loss']:.3f}"),
        (
            "steps",
            f"{model['steps']:,} of {model['batch_size']} x {model['seq_len']} tokens",
        ),
    ]
    if "plan" in found:
        rows += _plan_rows(found["plan"])
    console.print(make_table("Budget", None, rows))
    console.print(f"Scaling law: {found['law']['source']}.")
    if "plan" not in found:
        console.print("With --cluster the model is planned: days, and with --price costs.")


def _plan_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (
            "planned on",
            f"{plan['cluster']} as dp={plan['dp']} tp={plan['tp']} pp={plan['pp']}, "
            f"{plan['num_microbatches']} microbatches, remat {plan['remat']}",
        ),
        ("peak memory", f"{plan['peak_bytes'] / 2**30:.1f} GiB per device"),
        ("predicted step", f"{plan['step_s']:.3g} s, MFU {plan['mfu']:.1%}"),
        ("days", f"{plan['days']:,.1f}, {plan['device_hours']:,.0f} device hours"),
    ]
    if plan["cost"] is not None:
        rows.append(("cost", f"{plan['cost']:,.0f}"))
    return rows
