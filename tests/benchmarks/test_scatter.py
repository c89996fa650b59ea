import re

import pytest

from benchmarks.accuracy import PLOTS, plots
from benchmarks.results_table import ResultsTable
from benchmarks.scatter import scatter_svg


def test_a_point_on_the_diagonal_is_drawn_on_it():
    """Axes run from 1 to 100: the middle of both is 10."""
    text = scatter_svg({"a & b": [(10, 10), (1, 100)]}, x_label="x", y_label="y")
    points = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3"', text)
    middle, corner = [tuple(map(float, point)) for point in points]
    assert middle == ((64 + 490) / 2, (24 + 432) / 2)
    assert corner == (64, 24)
    assert "a &amp; b (2)" in text


@pytest.mark.parametrize("points", [[], [(0, 1)], [(1, -1)]])
def test_no_logarithm(points):
    with pytest.raises(ValueError, match="positive"):
        scatter_svg({"a": points}, x_label="", y_label="")


def test_figures_are_those_of_the_results():
    for name, text in plots(ResultsTable.load("accuracy_rows").rows).items():
        assert (PLOTS / name).read_text() == text
