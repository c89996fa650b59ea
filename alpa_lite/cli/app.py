"""The `alpa-lite` program: its verbs and their examples."""

from __future__ import annotations

from typing import Annotated

import typer

from alpa_lite.cli.budget_verb import budget
from alpa_lite.cli.compare import diff, whatif
from alpa_lite.cli.doctor import doctor
from alpa_lite.cli.exits import CommandGroup
from alpa_lite.cli.explain import explain
from alpa_lite.cli.launch import launch
from alpa_lite.cli.listings import clusters, models
from alpa_lite.cli.model_verb import model
from alpa_lite.cli.plan_verbs import plan, show
from alpa_lite.cli.report import report
from alpa_lite.cli.simulate import simulate
from alpa_lite.cli.train import train
from alpa_lite.version import __version__

PROGRAM = "alpa-lite"

app = typer.Typer(
    cls=CommandGroup,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Example: {PROGRAM} train",
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Plan how to split a JAX train step over a cluster."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command(epilog=f"Example: {PROGRAM} plan gpt-1.3b --cluster h100:2x8 --batch-size 64")(plan)
app.command(epilog=f"Example: {PROGRAM} show plan.json")(show)
app.command(epilog=f"Example: {PROGRAM} explain plan.json layers.3.mlp.up")(explain)
app.command(epilog=f"Example: {PROGRAM} diff before.json after.json")(diff)
app.command(
    epilog=f"Example: {PROGRAM} whatif plan.json --set cluster.hosts=2 --memory-budget 40GiB"
)(whatif)
app.command(epilog=f"Example: {PROGRAM} simulate plan.json --trace step.json.gz")(simulate)
app.command(epilog=f"Example: {PROGRAM} report plan.json -o report.html --explain")(report)
app.command(epilog=f"Example: {PROGRAM} train --steps 20")(train)
app.command(
    epilog=f"Example: {PROGRAM} launch -n 2 --devices-per-process 4 -- python train.py",
    context_settings={"allow_interspersed_args": False},
)(launch)
app.command(epilog=f"Example: {PROGRAM} model llama2-7b --seq 4096 --batch 1")(model)
app.command(
    epilog=f"Example: {PROGRAM} budget --gpus 512 --days 30 --cluster h100:64x8 --price 2.5"
)(budget)
app.command(epilog=f"Example: {PROGRAM} models")(models)
app.command(epilog=f"Example: {PROGRAM} clusters --json")(clusters)
app.command(epilog=f"Example: {PROGRAM} doctor")(doctor)


def main() -> None:
    """The console script."""
    app(prog_name=PROGRAM)
