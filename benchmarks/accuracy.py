"""Predictions held against published measurements.

    python -m benchmarks.accuracy                      all rows of benchmarks/data/published.csv
    python -m benchmarks.accuracy --data FILE          rows of another file with the same columns
    python -m benchmarks.accuracy --every 5            every fifth row of each source; nothing saved
    python -m benchmarks.accuracy --only ID ...        these rows only; nothing saved
    python -m benchmarks.accuracy --flash              fused attention as such; nothing saved

Every row is planned as the grid it was measured on (`ThreeDParallel`) by the planner's own pricing,
and nothing is fitted to a source. A row with something that the planner has no word for is counted
as not expressible, and says why. Rows measured with a fused attention kernel are planned with the
attention of the models here, which keeps scores in memory, and are summed up apart; --flash plans
them with `alpa_lite.flash_attention`. Layers are planned as a scan, which is quick, or with
--unrolled one by one. A row that takes longer than --limit seconds is not predicted. With --rows
FILE every result is written there at once, and those found there are not planned again: an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from scipy import stats

from benchmarks.published import DATA, PublishedRow, load_published
from benchmarks.results_table import Column, ResultsTable, describe_environment
from benchmarks.scatter import scatter_svg

GIB = 2**30
PLAIN = "scores in memory, as planned"
FUSED = "fused, planned with scores in memory"
PLOTS = Path(__file__).parent.parent / "docs"


def main() -> None:
    """Predict, print, and save if all rows of the project's file were asked for."""
    options = _options()
    import jax

    jax.config.update("jax_platforms", "cpu")
    rows = _chosen(load_published(options.data), options.every, options.only)
    found = predict_rows(
        rows, scan_layers=not options.unrolled, flash=options.flash, limit_s=options.limit,
        kept=options.rows,
    )  # fmt: skip
    summary = summarise(found)
    for line in summary:
        print(json.dumps(line))
    for why, count in Counter(r["why"] for r in found if r["why"]).most_common():
        print(f"not expressible, {count} rows: {why}")
    changed = options.only or options.unrolled or options.flash
    if options.data == DATA and options.every == 1 and not changed:
        _save(summary, found)


def predict_rows(
    rows: Sequence[PublishedRow], *, scan_layers: bool, flash: bool = False, limit_s: int = 60,
    kept: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One result per row; rows that ask the planner the same are planned once."""
    from alpa_lite.passes.rules import RuleTable
    from benchmarks.published_plan import NotExpressibleError, predict

    table = RuleTable()
    earlier = _read_kept(kept)
    known: dict[Any, Any] = {}
    found = []
    for row in track(rows, description="predicting", disable=not os.isatty(2)):
        question = _question(row)
        asked = hashlib.sha256(repr((question, scan_layers, flash)).encode()).hexdigest()[:16]
        if (row.id, asked) in earlier:
            found.append(earlier[row.id, asked])
            continue
        if question not in known:
            try:
                with time_limit(limit_s):
                    known[question] = predict(row, table, scan_layers=scan_layers, flash=flash)
            except NotExpressibleError as problem:
                known[question] = str(problem)
            except TimeoutError:
                known[question] = f"no plan within {limit_s} s"
        found.append(_result(row, known[question]) | {"asked": asked})
        if kept is not None:
            with kept.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    return found


def _read_kept(path: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
    """Results of an earlier run by row and question."""
    if path is None or not path.exists():
        return {}
    results = [json.loads(line) for line in path.read_text().splitlines()]
    return {(result["id"], result["asked"]): result for result in results}


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in the block if it takes longer; in the main thread only."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _question(row: PublishedRow) -> tuple[Any, ...]:
    """All of a row that the planner is told."""
    answers = (
        "id", "source", "url", "system", "framework", "model", "step_s", "step_origin",
        "tflops_per_device", "flops_convention", "mfu", "hfu", "memory_gib", "memory_kind", "notes",
    )  # fmt: skip
    return tuple(getattr(row, name) for name in PublishedRow.__slots__ if name not in answers)


def _result(row: PublishedRow, answer: Any) -> dict[str, Any]:
    result: dict[str, Any] = {
        "id": row.id, "source": row.publisher, "accelerator": row.accelerator,
        "devices": row.num_devices, "model": row.model, "seq_len": row.seq_len,
        "grid": f"dp{row.dp} tp{row.tp} pp{row.pp}x{row.virtual_stages}",
        "attention": FUSED if row.fused_attention else PLAIN,
        "measured_s": row.step_s, "measured_gib": row.memory_gib, "why": "",
    }  # fmt: skip
    if isinstance(answer, str):
        return {**result, "why": answer}
    gib = answer.peak_bytes / GIB
    return {
        **result,
        "predicted_s": answer.step_s,
        "ratio": answer.step_s / row.step_s,
        "predicted_gib": gib,
        "memory_ratio": None if row.memory_gib is None else gib / row.memory_gib,
        "fits": answer.fits,
        "remat": answer.remat,
        "compute_s": answer.compute_s,
        "communication_s": answer.communication_s,
        "update_s": answer.update_s,
        "bubble_share": answer.bubble_share,
        "wall_s": answer.wall_s,
    }


def summarise(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors per source, accelerator and kind of attention, on several hosts, and of all rows."""
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    for key in ("source", "accelerator", "attention"):
        names = dict.fromkeys(result[key] for result in found)
        groups += [(f"{key}: {name}", [r for r in found if r[key] == name]) for name in names]
    for attention in (PLAIN, FUSED):
        several = [r for r in found if r["devices"] > 8 and r["attention"] == attention]
        groups.append((f"more than 8 devices; {attention}", several))
    groups.append(("all", list(found)))
    return [_errors(name, results) for name, results in groups if results]


def _errors(name: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    predicted = [r for r in results if not r["why"]]
    line: dict[str, Any] = {
        "group": name, "rows": len(results), "predicted": len(predicted),
        "misfits": sum(not r["fits"] for r in predicted),
    }  # fmt: skip
    line |= _statistics("time", [r["ratio"] for r in predicted])
    measured = [r["measured_s"] for r in predicted]
    line["time_tau"] = _tau(measured, [r["predicted_s"] for r in predicted])
    with_memory = [r for r in predicted if r["memory_ratio"] is not None]
    line["memory_rows"] = len(with_memory)
    line |= _statistics("memory", [r["memory_ratio"] for r in with_memory])
    return line


def _statistics(name: str, ratios: Sequence[float]) -> dict[str, float | None]:
    """Median and 90th percentile of |error|, and the median error with its sign."""
    if not ratios:
        return dict.fromkeys((f"{name}_median", f"{name}_p90", f"{name}_bias"))
    errors = np.array(ratios) - 1
    return {
        f"{name}_median": float(np.median(abs(errors))),
        f"{name}_p90": float(np.quantile(abs(errors), 0.9)),
        f"{name}_bias": float(np.median(errors)),
    }


def _tau(measured: Sequence[float], predicted: Sequence[float]) -> float | None:
    """Kendall's rank correlation; None for fewer than three rows."""
    if len(measured) < 3:
        return None
    tau = float(stats.kendalltau(measured, predicted).statistic)
    return None if np.isnan(tau) else tau


def _chosen(
    rows: Sequence[PublishedRow], every: int, only: Sequence[str]
) -> tuple[PublishedRow, ...]:
    """Every n-th row of each source, or those named."""
    if only:
        return tuple(row for row in rows if row.id in only)
    counts: Counter[str] = Counter()
    chosen = []
    for row in rows:
        if counts[row.publisher] % every == 0:
            chosen.append(row)
        counts[row.publisher] += 1
    return tuple(chosen)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="FILE", help="published rows")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every n-th of a source")
    parser.add_argument("--only", nargs="+", metavar="ID", default=[], help="these rows only")
    parser.add_argument("--unrolled", action="store_true", help="layers one by one; slow")
    parser.add_argument("--flash", action="store_true", help="fused attention as such")
    parser.add_argument("--limit", type=int, default=60, metavar="S", help="seconds for a row")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep results here, go on there")
    found = parser.parse_args()
    if found.every < 1:
        parser.error(f"--every {found.every}: a number from 1")
    if found.limit < 1:
        parser.error(f"--limit {found.limit}: a number of seconds from 1")
    return found


def _save(summary: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> None:
    about = {
        "command": "python -m benchmarks.accuracy",
        "environment": describe_environment("no accelerator"),
    }
    ResultsTable(
        title="Predicted against published train steps", columns=COLUMNS, rows=tuple(summary),
        **about,
    ).save("accuracy")  # fmt: skip
    ResultsTable(
        title="Predicted against published train steps, row by row", columns=ROW_COLUMNS,
        rows=tuple({k: v for k, v in r.items() if k != "asked"} for r in found), **about,
    ).save("accuracy_rows")  # fmt: skip
    for name, text in plots(found).items():
        (PLOTS / name).write_text(text)


def plots(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Figures of docs by file name: seconds and bytes, predicted over measured, by source."""
    figures = {}
    for name, measured, predicted, unit in (
        ("accuracy-time.svg", "measured_s", "predicted_s", "s per step"),
        ("accuracy-memory.svg", "measured_gib", "predicted_gib", "GiB per device"),
    ):
        groups: dict[str, list[tuple[float, float]]] = {}
        for r in found:
            if not r["why"] and r[measured] is not None:
                fused = ", fused attention" if r["attention"] == FUSED else ""
                groups.setdefault(r["source"] + fused, []).append((r[measured], r[predicted]))
        if groups:
            figures[name] = scatter_svg(
                groups, x_label=f"measured, {unit}", y_label=f"predicted, {unit}"
            )
    return figures


COLUMNS = (
    Column("group", "Rows of"),
    Column("rows", "Rows", "d"),
    Column("predicted", "Predicted", "d"),
    Column("misfits", "Said not to fit", "d"),
    Column("time_median", "Time: median error", ".1%"),
    Column("time_p90", "90th percentile", ".1%"),
    Column("time_bias", "Bias", "+.1%"),
    Column("time_tau", "Kendall's tau", ".2f"),
    Column("memory_rows", "Rows with memory", "d"),
    Column("memory_median", "Memory: median error", ".1%"),
    Column("memory_p90", "90th percentile", ".1%"),
    Column("memory_bias", "Bias", "+.1%"),
)
ROW_COLUMNS = (
    Column("id", "Row"),
    Column("source", "Source"),
    Column("accelerator", "Accelerator"),
    Column("devices", "Devices", "d"),
    Column("model", "Model"),
    Column("seq_len", "Sequence", "d"),
    Column("grid", "Grid"),
    Column("attention", "Measured attention"),
    Column("remat", "Remat"),
    Column("measured_s", "Measured s", ".3g"),
    Column("predicted_s", "Predicted s", ".3g"),
    Column("ratio", "Ratio", ".2f"),
    Column("compute_s", "Compute s", ".3g"),
    Column("communication_s", "Communication s", ".3g"),
    Column("update_s", "Update s", ".3g"),
    Column("bubble_share", "Bubble", ".0%"),
    Column("measured_gib", "Measured GiB", ".1f"),
    Column("predicted_gib", "Predicted GiB", ".1f"),
    Column("memory_ratio", "Memory ratio", ".2f"),
    Column("fits", "Fits"),
    Column("wall_s", "Planning s", ".1f"),
    Column("why", "Not expressible"),
)

if __name__ == "__main__":
    main()
