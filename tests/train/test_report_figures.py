"""Curves of bounded length, and heat maps of the normalisation layers."""

import numpy as np
import pytest

from syncnorm.train.report.heatmaps import STATISTICS, Grid, grid, resample
from syncnorm.train.report.run import read_runs
from syncnorm.train.report.series import smooth, thin
from tests.train.report_page import report
from tests.train.report_runs import Example, write_run


def test_layers_are_shown_as_far_as_they_are_recorded(tmp_path):
    plain, renorm = Example(epochs=2), Example(epochs=2, renorm=True)
    first = write_run(tmp_path / "a", [plain.start(), *plain.course(0, plain.total)])
    page = report(tmp_path, first)
    assert page.figure("Gap of the mean of 14 layers of a")
    assert "Clipped scales" not in page.text
    second = write_run(tmp_path / "b", [renorm.start(), *renorm.course(0, renorm.total)])
    page = report(tmp_path, first, second)
    assert page.figure("Clipped scales of 14 layers of b")
    with pytest.raises(StopIteration):
        page.figure("Clipped scales of 14 layers of a")


def test_a_layers_statistics_stand_where_they_belong(tmp_path):
    records = [
        {
            "event": "layers",
            "step": 20,
            "layers": {"x": {"mean_gap": 3.0}, "y": {"mean_gap": "inf", "var_gap": 1.0}},
        },
        {"event": "layers", "step": 10, "layers": {"x": {"mean_gap": 2.0, "r_clipped": None}}},
    ]
    run = read_runs([write_run(tmp_path / "a", records)])[0]
    found = grid(run, next(each for each in STATISTICS if each.name == "mean_gap"))
    assert found.layers == ["x", "y"]
    assert found.steps.tolist() == [10, 20]
    np.testing.assert_equal(found.values, [[2.0, 3.0], [np.nan, np.nan]])
    assert grid(run, next(each for each in STATISTICS if each.name == "r_clipped")).layers == []


def test_all_runs_have_one_scale_of_colours(tmp_path):
    runs = [
        write_run(
            tmp_path / f"{high}",
            [{"event": "layers", "step": 1, "layers": {"x": {"mean_gap": high}}}],
        )
        for high in (1.0, 6.0)
    ]
    alone = [text for tag, text in report(tmp_path, runs[0]).tagged if tag == "text"]
    both = [text for tag, text in report(tmp_path, *runs).tagged if tag == "text"]
    assert alone == ["0", "1", "x", "0.00", "0.25", "0.50", "0.75", "1.00"]
    assert both == ["0", "1", "x", "0.0", "1.5", "3.0", "4.5"] * 2


@pytest.mark.parametrize("value", [-1.0, 0.0, 5e-324, 1e308, -1e308])
def test_statistics_at_the_edges(tmp_path, value):
    layers = {"x": {"mean_gap": value, "between_share": value}}
    run = write_run(
        tmp_path / "a", [{"event": "layers", "step": step, "layers": layers} for step in (1, 2)]
    )
    assert report(tmp_path, run).figure("Gap of the mean")


def test_a_deep_network_names_some_of_its_layers(tmp_path):
    layers = {f"layer.{index}": {"mean_gap": float(index)} for index in range(150)}
    page = report(
        tmp_path, write_run(tmp_path / "a", [{"event": "layers", "step": 1, "layers": layers}])
    )
    assert page.figure("Gap of the mean of 150 layers")
    labels = [text for tag, text in page.tagged if tag == "text" and text.startswith("layer.")]
    assert labels == [f"layer.{index}" for index in range(0, 150, 3)]


def test_columns_of_a_heat_map():
    few = Grid(["x"], np.arange(10.0, 110.0, 10.0), np.arange(10.0)[None])
    assert resample(few)[2].tolist() == [list(range(10))]
    many = Grid(["x"], np.arange(4800.0), np.arange(4800.0)[None])
    cells = resample(many)[2]
    assert cells.shape == (1, 240)
    np.testing.assert_allclose(cells[0, :2], [9.5, 29.5], atol=0.5)
    late = Grid(["x"], np.array([0.0, 1.0, 9.0]), np.array([[1.0, 2.0, 5.0]]))
    assert resample(late)[2].tolist() == [
        [1.5, 2.0, 5.0]
    ]  # nothing from 3 to 6: the record before goes on


def test_thinned_curves_keep_peaks_dips_and_gaps():
    y = np.ones(200_000)
    y[123_456], y[77_777], y[50_000:60_000] = 9.0, -4.0, np.nan
    x, thinned = thin(np.arange(200_000.0), y)
    assert len(x) <= 2000
    assert (x[0], x[-1]) == (0, 199_999)
    assert x[np.nanargmax(thinned)] == 123_456
    assert x[np.nanargmin(thinned)] == 77_777
    assert np.isnan(thinned[(x > 50_500) & (x < 59_500)]).all()
    assert thin(np.arange(5.0), y[:5])[0].tolist() == [0, 1, 2, 3, 4]


def test_smoothing_forgets_a_peak():
    y = np.full(10_000, 0.25)
    y[5_000], y[7_000:7_600] = 1e30, np.nan
    smoothed = smooth(np.arange(10_000.0), y)
    assert smoothed is not None
    far = abs(smoothed[0] - 5_000) > 200
    known = np.isfinite(smoothed[1])
    np.testing.assert_allclose(smoothed[1][far & known], 0.25, rtol=1e-12)
    assert smoothed[1].max(where=known, initial=0) > 1e26
    assert not known.all()
    assert smooth(np.arange(20.0), y[:20]) is None
