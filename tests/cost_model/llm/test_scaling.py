"""The scaling law's optimum against a search."""

import numpy as np
import pytest

from alpa_lite.cost_model.llm.scaling import SCALING_LAWS, compute_optimum


@pytest.mark.parametrize("name", SCALING_LAWS)
@pytest.mark.parametrize("flops", [1e19, 5.76e23, 1e26])
def test_no_other_split_of_the_budget_is_better(name, flops):
    law = SCALING_LAWS[name]
    best = compute_optimum(flops, law)
    assert 6 * best.parameters * best.tokens == pytest.approx(flops, rel=1e-12)
    parameters = best.parameters * np.geomspace(0.2, 5, 2001)
    losses = law.loss(parameters, flops / (6 * parameters))
    assert best.loss == law.loss(best.parameters, best.tokens)
    assert best.loss <= losses.min() * (1 + 1e-12)  # float64 rounding
    assert abs(losses.argmin() - 1000) <= 1


def test_lecture_constants():
    """L(N, D) = 406.4 / N^0.34 + 410.7 / D^0.29 + 1.69."""
    law = SCALING_LAWS["hoffmann"]
    n, d = 70e9, 1.4e12
    assert law.loss(n, d) == pytest.approx(406.4 / n**0.34 + 410.7 / d**0.29 + 1.69, rel=1e-12)


def test_second_fit_agrees_with_chinchilla_itself():
    """Besiroglu et al.: their fit is consistent with about 20 tokens per parameter."""
    best = compute_optimum(5.76e23, SCALING_LAWS["besiroglu"])
    assert best.tokens / best.parameters == pytest.approx(20, rel=0.15)


def test_more_compute_buys_both():
    optima = [compute_optimum(c, SCALING_LAWS["hoffmann"]) for c in (1e21, 1e22, 1e23)]
    assert sorted(o.parameters for o in optima) == [o.parameters for o in optima]
    assert sorted(o.tokens for o in optima) == [o.tokens for o in optima]
    assert sorted((o.loss for o in optima), reverse=True) == [o.loss for o in optima]


@pytest.mark.parametrize("flops", [0, -1, float("inf"), float("nan")])
def test_bad_budget(flops):
    with pytest.raises(ValueError, match="flops must be a positive number"):
        compute_optimum(flops, SCALING_LAWS["hoffmann"])
