"""What `alpa-lite train` shows while it runs."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
from rich.console import Console

from alpa_lite.cli.output import Report, make_table, progress_bar
from alpa_lite.cli.trial import Difference, Run, StepReport
from alpa_lite.models import ModelSetup
from alpa_lite.passes.plan import Plan
from alpa_lite.passes.plan_text import axis_rows, layout_rows, summary_rows
from alpa_lite.passes.units import format_seconds

LOSS_LINES = 8


class TrainView:
    """Lines, tables and progress bars on one console; of those only the bars if `quiet`."""

    def __init__(self, console: Console, devices: Sequence[jax.Device], *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._count = len(devices)
        self._virtual = devices[0].platform == "cpu"
        self._devices = (
            f"{self._count} {'virtual CPU' if self._virtual else devices[0].device_kind} devices"
        )

    def line(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            self._console.print(text)

    @contextmanager
    def phase(self) -> Iterator[Report]:
        """A progress bar for one part of the work."""
        with progress_bar(self._console) as report:
            yield report

    @contextmanager
    def steps(self, what: str, count: int, *, show_losses: bool = False) -> Iterator[StepReport]:
        """A progress bar over steps, with a line every few of them if asked for."""
        every = max(1, count // LOSS_LINES)
        recent: list[float] = []
        with self.phase() as report:
            report(what, 0.0)

            def after_step(number: int, loss: float, seconds: float) -> None:
                report(f"{what}, loss {loss:.3f}", number / count)
                recent.append(loss)
                if show_losses and (number == 1 or number % every == 0 or number == count):
                    self.line(f"step {number:4}   loss {statistics.mean(recent):.3f}")
                    recent.clear()

            yield after_step

    def model(self, setup: ModelSetup, batch_size: int) -> None:
        """What is trained."""
        self.line(
            f"{setup.name}: {setup.num_parameters:,} parameters, {batch_size} x "
            f"{setup.config.seq_len} bytes of Python source per step, {self._devices}"
        )

    def measured(self, seconds: float) -> None:
        """That the devices were calibrated."""
        self.line(f"Measured the devices in {seconds:.0f} s (--cluster skips this)")

    def plan(self, plan: Plan) -> None:
        """The plan as tables; `alpa-lite plan` shows all of it."""
        if self._quiet:
            return
        rows = [*summary_rows(plan), *((f"axis {name}", what) for name, what in axis_rows(plan))]
        self._console.print(make_table(f"Plan for {plan.cluster.name}", None, rows))
        shown = {name: spec for name, spec in plan.inputs.items() if ".opt_state." not in name}
        title = "Mesh axes that split each dim of parameters and batch"
        self._console.print(make_table(title, ("input", "layout"), layout_rows(shown)))

    def result(self, plan: Plan, sharded: Run, single: Run, tokens_per_s: float) -> None:
        """Speed, as predicted, as measured and on one device."""
        self.line(
            f"{tokens_per_s:,.0f} tokens/s: {format_seconds(sharded.step_s)} per step, predicted "
            f"{format_seconds(plan.predicted.step_s)}; one device takes "
            f"{format_seconds(single.step_s)}"
        )
        if self._virtual:
            self.line(f"The virtual devices share {os.cpu_count()} cores, so do not expect a gain.")

    def comparison(self, found: Difference, rounding: Difference, allowed: Difference) -> None:
        """The largest differences, and what they are measured by."""
        rows = [
            (name, f"{d.loss:.1e}", f"{d.state:.1e}", d.leaf)
            for name, d in (
                (f"{self._count} devices and one", found),
                ("one device and itself, started one bit off", rounding),
                ("allowed", allowed),
            )
        ]
        header = ("largest difference between", "loss", "state", "where")
        self._console.print(make_table("Same result?", header, rows, right={1, 2}))
