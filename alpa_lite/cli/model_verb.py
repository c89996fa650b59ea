"""`alpa-lite model`: parameters, operations and bytes of a language model.

Starts no device.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import jax
import typer

from alpa_lite.cli.exits import InputError
from alpa_lite.cli.hub_config import load_hub_config
from alpa_lite.cli.model_report import REMATS, Measured, model_report, print_report
from alpa_lite.cli.model_shapes import shape_of
from alpa_lite.cli.options import JsonOption, SetOption, parse_overrides
from alpa_lite.cli.output import print_json, stdout_console
from alpa_lite.cli.target import build_setup
from alpa_lite.cli.traced_flops import TracedFlops, traced_flops
from alpa_lite.cost_model import Cluster
from alpa_lite.cost_model.llm import TransformerShape

DEFAULT_SEQ = 2048


def model(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model preset (see `alpa-lite models`), or the path of a Hugging Face "
            "config.json.",
        ),
    ],
    seq: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**24, metavar="TOKENS",
            help=f"Of each sequence; the preset's, or {DEFAULT_SEQ} for a config.json.",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=2**24, metavar="N", help="Sequences per step.")
    ] = 1,
    step_seconds: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="A measured step, to compute MFU and HFU of."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="CLUSTER", help="What the step was measured on, such as h100:4x8."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Whose peak rate the step is held against.")
    ] = "bfloat16",
    remat: Annotated[
        str, typer.Option(help="What the measured backward pass computed again: none, dots, full.")
    ] = "none",
    traced: Annotated[
        bool, typer.Option("--traced", help="Count the traced train step of a preset beside it.")
    ] = False,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """Count parameters, operations and memory of a language model.

    Everything comes from closed forms, in an instant. Operations count 2 per multiply-add and full
    attention. Exits with 3 on bad input. With --json the output is an object with parameters,
    flops, memory_bytes, and utilisation and traced where asked for.
    """
    measured = _measured(step_seconds, cluster, dtype, remat)
    shape, length, counted = _load(target, seq, batch, overrides or [], traced)
    report = model_report(shape, batch=batch, seq=length, measured=measured, traced=counted)
    if json:
        print_json(report)
    else:
        print_report(stdout_console(), report)


def _load(
    target: str, seq: int | None, batch: int, overrides: list[str], traced: bool
) -> tuple[TransformerShape, int, TracedFlops | None]:
    if target.endswith(".json") or "/" in target:
        if overrides or traced:
            raise InputError(
                "--set and --traced are for model presets; change the config.json instead"
            )
        return load_hub_config(Path(target)), seq or DEFAULT_SEQ, None
    changed = parse_overrides(overrides)
    if seq is not None:
        if changed.get("seq_len", seq) != seq:
            raise InputError(f"--seq {seq} and --set seq_len={changed['seq_len']} contradict")
        changed["seq_len"] = seq
    setup = build_setup(target, None, changed)
    shape = shape_of(target, setup.config)
    if not traced:
        return shape, setup.config.seq_len, None
    jax.config.update("jax_platforms", "cpu")
    if getattr(setup.config, "scan_layers", True) is False:
        setup = build_setup(target, None, {**changed, "scan_layers": True})  # traced sooner
    return shape, setup.config.seq_len, traced_flops(setup, batch)


def _measured(
    step_seconds: float | None, cluster: str | None, dtype: str, remat: str
) -> Measured | None:
    if remat not in REMATS:
        raise InputError(f"--remat {remat!r} is none of {', '.join(REMATS)}")
    if step_seconds is None and cluster is None:
        return None
    if step_seconds is None or cluster is None:
        raise InputError("utilisation needs both --step-seconds and --cluster")
    if not 0 < step_seconds < math.inf:
        raise InputError(f"--step-seconds {step_seconds:g} is not a positive number")
    hardware = Cluster.resolve(cluster)
    rates = hardware.device.flops_per_s
    if dtype not in rates:
        raise InputError(f"--dtype {dtype!r}: {cluster} has figures for {', '.join(rates)}")
    return Measured(
        step_s=step_seconds, num_devices=hardware.num_devices, peak_flops_per_s=rates[dtype],
        remat=remat,
    )  # fmt: skip
