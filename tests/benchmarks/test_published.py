"""The published rows, the checks of such files, and what is made of a row."""

import csv
import dataclasses

import pytest

from alpa_lite.cli.model_shapes import shape_of
from alpa_lite.cost_model.llm import count_flops
from alpa_lite.models import build
from alpa_lite.passes.rules import RuleTable
from benchmarks.accuracy import _chosen, _errors
from benchmarks.published import DATA, PublishedDataError, load_published
from benchmarks.published_plan import (
    NotExpressibleError,
    cluster_of,
    method_of,
    predict,
    setup_of,
)

ROWS = load_published()
BY_ID = {row.id: row for row in ROWS}


def test_selection_is_wide():
    assert len(ROWS) >= 150
    assert len({row.publisher for row in ROWS}) >= 5
    assert len({row.accelerator for row in ROWS}) >= 5
    assert sum(row.num_hosts > 1 for row in ROWS) >= 100
    assert sum(row.num_experts is not None for row in ROWS) >= 20
    assert sum(row.memory_gib is not None for row in ROWS) >= 40
    assert all(row.url.startswith("https://") for row in ROWS)


def model_flops(row):
    """Training operations of a dense row with full attention, by closed forms."""
    setup = setup_of(dataclasses.replace(row, precision="bf16"), scan_layers=True)
    shape = shape_of(row.id, setup.config)
    parts = count_flops(shape, batch=row.global_batch, seq=row.seq_len)
    return sum(part.training for part in parts.values())


# Rows whose notes name the source's own count, which does not follow from the shape, are left out.
DENSE = [
    row
    for row in ROWS
    if row.num_experts is None and row.tflops_per_device and "FLOPs/seq" not in row.notes
]


@pytest.mark.parametrize("publisher", sorted({row.publisher for row in DENSE}))
def test_printed_tflops_follow_from_step_and_shape(publisher):
    """TFLOP/s x seconds x devices is the model's work: a slip in any cell would show.

    Sources count full or causal attention, and some the recomputed forward pass (4 / 3); 8 % is
    left for what they leave out (vocabulary, norms).
    """
    ratios = []
    for row in (row for row in DENSE if row.publisher == publisher):
        printed = row.tflops_per_device * 1e12 * row.step_s * row.num_devices
        ratios.append(printed / model_flops(row))
    close = [any(abs(r / c - 1) < 0.08 for c in (0.92, 1, 4 / 3)) for r in ratios]
    assert sum(close) >= 0.9 * len(close), sorted(ratios)


@pytest.fixture
def write(tmp_path):
    def write(changes=(), *, columns=None, lines=None):
        file = tmp_path / "rows.csv"
        if lines is not None:
            file.write_text(lines)
            return file
        with DATA.open() as source:
            table = list(csv.DictReader(source))[:2]
        table[1].update(changes)
        with file.open("w", newline="") as target:
            writer = csv.DictWriter(target, columns or list(table[0]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(table)
        return file

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_s": ""}, "row 3: step_s: found '', allowed a number from 1e-06 to 1e+07"),
        ({"step_s": "nan"}, "row 3: step_s: found 'nan', allowed a number"),
        ({"tp": "0"}, "row 3: tp: found '0', allowed a whole number from 1 to 1e+06"),
        ({"tp": "1.5"}, "row 3: tp: found '1.5', allowed a whole number"),
        (
            {"microbatch": "x"},
            "microbatch: found 'x', allowed a whole number from 1 to 1e+09 or no",
        ),
        ({"gated_mlp": "yes"}, "row 3: gated_mlp: found 'yes', allowed 0 or 1"),
        ({"remat": "some"}, "row 3: remat: found 'some', allowed '' or 'none'"),
        ({"dp": "3"}, "row 3: dp: found '3', allowed 64 devices"),
        ({"model": ""}, "row 3: model: found '', allowed printable text"),
        ({"num_experts": "8"}, "allowed experts_per_token and expert_size too"),
        ({"id": "vtrain_multi-00404"}, "row 3: id: found 'vtrain_multi-00404' again, as in row 2"),
    ],
)
def test_bad_field(write, changes, message):
    with pytest.raises(PublishedDataError) as error:
        load_published(write(changes))
    assert message in str(error.value)


def test_bad_columns(write):
    known = [field.name for field in dataclasses.fields(ROWS[0])]
    with pytest.raises(PublishedDataError, match="row 1: missing column 'notes'"):
        load_published(write(columns=known[:-1]))
    with pytest.raises(PublishedDataError, match="row 1: unknown column 'mood'"):
        load_published(write(lines=",".join([*known, "mood"])))
    with pytest.raises(PublishedDataError, match="row 2: found 1 cells, allowed"):
        load_published(write(lines=",".join(known) + "\nx\n"))
    with pytest.raises(PublishedDataError, match="empty"):
        load_published(write(lines=""))


def test_a_row_becomes_its_grid_on_its_cluster():
    row = BY_ID["vtrain_multi-00443"]
    method = method_of(row)
    assert (method.dp, method.tp, method.pp) == (row.dp, row.tp, row.pp) == (32, 2, 8)
    assert method.num_microbatches * row.dp * row.microbatch == row.global_batch
    assert method.split_weights and method.schedule == "1f1b"
    cluster = cluster_of(row)
    assert cluster.num_devices == row.num_devices == 512
    assert cluster.inter_host.bytes_per_s == 100 * 0.12e9
    config = setup_of(row, scan_layers=True).config
    assert (config.hidden_size, config.num_layers, config.seq_len) == (8192, 48, 2048)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"precision": "fp8"}, "matrix products in fp8"),
        ({"cp": 2, "dp": 16}, "context parallelism"),
        ({"num_experts": 8, "experts_per_token": 2, "expert_size": 64}, "experts split over"),
        ({"microbatch": None}, "no microbatch size"),
        ({"microbatch": 7}, "does not divide"),
        ({"accelerator": "abacus"}, "no cluster preset for abacus"),
        ({"virtual_stages": 5}, "unequal stages"),
    ],
)
def test_what_is_not_expressible(changes, why):
    row = dataclasses.replace(BY_ID["vtrain_multi-00443"], **changes)
    with pytest.raises(NotExpressibleError, match=why):
        predict(row, RuleTable(), scan_layers=True)


def test_prediction_is_the_planners():
    import alpa_lite

    row = dataclasses.replace(
        BY_ID["vtrain_single-01639"], num_layers=2, hidden_size=256, num_heads=8, num_kv_heads=8,
        mlp_size=1024, vocab_size=512, seq_len=128,
    )  # fmt: skip
    found = predict(row, RuleTable(), scan_layers=True)
    setup = build(
        "gpt-1.3b", num_layers=2, hidden_size=256, num_heads=8, vocab_size=512, seq_len=128,
        dtype="float16", scan_layers=True, remat=True,
    )  # fmt: skip
    step = alpa_lite.parallelize(setup.step, method=method_of(row), cluster=cluster_of(row))
    plan = step.plan(setup.state_shapes(), setup.batch_shapes(row.global_batch))
    assert found.step_s == plan.predicted.step_s
    assert found.peak_bytes == plan.predicted.peak_bytes
    assert found.fits and found.remat == "full"


def result(ratio, memory_ratio=None, *, why="", measured=1.0):
    return {
        "ratio": ratio, "memory_ratio": memory_ratio, "why": why, "measured_s": measured,
        "predicted_s": ratio * measured, "fits": True,
    }  # fmt: skip


def test_errors_of_a_group():
    """Errors -0.2, 0, 0.1, 0.4: median |error| 0.15, 90th percentile 0.34, signed median 0.05."""
    ratios = [(0.8, 1), (1.0, 2), (1.1, 3), (1.4, 4)]
    rows = [result(r, measured=m) for r, m in ratios]
    found = _errors("x", [*rows, {"why": "no word for it"}])
    assert (found["rows"], found["predicted"]) == (5, 4)
    assert found["time_median"] == pytest.approx(0.15)
    assert found["time_p90"] == pytest.approx(0.34)
    assert found["time_bias"] == pytest.approx(0.05)
    assert found["time_tau"] == 1
    assert found["memory_rows"] == 0 and found["memory_median"] is None


def test_every_nth_row_of_each_source():
    chosen = _chosen(ROWS, 10, ())
    assert {row.publisher for row in chosen} == {row.publisher for row in ROWS}
    assert len(chosen) < len(ROWS) / 8
    assert _chosen(ROWS, 1, ()) == ROWS
    assert [row.id for row in _chosen(ROWS, 1, ("dgxc-02416",))] == ["dgxc-02416"]
