"""The attention benchmark's own arithmetic, and one round of it on the CPU."""

import numpy as np
import pytest

from benchmarks import attention, attention_tuner
from benchmarks.attention_variants import BACKWARD, FORWARD, VARIANTS, Problem, errors

SMALL = Problem(seq=128, head_dim=32, tokens=128, width=64, group=2)


def test_flops():
    """16384 tokens, width 2048, sequence 4096: 4 * 4 * 4096^2 * 2048 forward, half if causal."""
    full = Problem(seq=4096, head_dim=128, causal=False)
    assert full.flops(FORWARD) == 4 * 4 * 4096**2 * 2048
    assert full.flops(BACKWARD) == 2.5 * full.flops(FORWARD)
    causal = Problem(seq=4096, head_dim=64)
    assert causal.flops(FORWARD) == full.flops(FORWARD) / 2


def test_flops_of_a_window_are_those_of_the_pairs_seen():
    problem = Problem(seq=100, head_dim=8, width=8, tokens=100, window=7)
    distance = np.subtract.outer(np.arange(100), np.arange(100))
    seen = np.sum((distance >= 0) & (distance < 7))
    assert problem.flops(FORWARD) == 4 * 8 * seen


def test_names_are_unique():
    names = [problem.name for problem in attention.PROBLEMS]
    assert len(set(names)) == len(names)
    assert attention.results_name("NVIDIA H200") == "attention_nvidia-h200"


@pytest.mark.slow
def test_a_round_on_the_cpu(monkeypatch, capsys):
    """What cannot run here is left out and said; XLA and ours agree and are timed."""
    monkeypatch.setattr(attention, "ROUNDS", 1)
    right = attention.check((SMALL,))
    assert {"ours", "xla"} <= set(right)
    assert "cudnn cannot" in capsys.readouterr().out
    rows = attention.measure(SMALL, ["ours", "xla", "cudnn"])
    assert [row["pass"] for row in rows] == [FORWARD, BACKWARD]
    assert all(row["ours"] > 0 and row["xla"] > 0 and "cudnn" not in row for row in rows)
    attention._table("CPU", rows).to_markdown()


@pytest.mark.slow
def test_errors_are_found():
    wrong = VARIANTS["xla"](Problem(seq=128, head_dim=32, tokens=128, width=64, causal=False))
    assert errors(wrong, SMALL)[0] > 0.1


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attention"])
    with pytest.raises(SystemExit) as end:
        attention.main()
    assert end.value.code == 0
    assert "no GPU" in capsys.readouterr().out


def test_tuner_drops_what_does_not_fit():
    problem, spec = attention_tuner.problem_of(256, "causal")
    found = list(attention_tuner.candidates(256, FORWARD))
    assert found[0] == attention_tuner.DEFAULTS[256]
    assert len(set(found)) == len(found)
    too_large = max(found, key=lambda blocks: blocks.forward.block_kv * blocks.forward.stages)
    assert not attention_tuner.lowers(spec, problem, too_large, FORWARD)
    assert attention_tuner.lowers(spec, problem, found[0], FORWARD)
