"""The pictures of a run: whole numbers of events and steps, and legends beside what they explain."""

import pytest
from matplotlib.figure import Figure

from scalora.runs import plots

EVENT = {"alpha": (0.5, 1.0, 2.0), "beta": (0.5, 1.0, 2.0), "shares": {"column": 0.4, "scalar": 0.6}}
KINDS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 4.0)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure of a run with so many events."""

    def draw(count) -> Figure:
        kept = []
        monkeypatch.setattr(plots, "save", lambda figure, path: kept.append(figure))
        events = [{"step": 3 * i, **EVENT} for i in range(count)]
        plots.draw_rank([{"step": i, "kinds": KINDS} for i in (1, 2)], events, 4, tmp_path / "rank.png")
        kept[0].draw_without_rendering()
        return kept[0]

    return draw


@pytest.mark.parametrize("count", [1, 2, 3, 14])
def test_events_and_steps_are_whole_numbers(drawn, count):
    for axis in drawn(count).axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(float(tick).is_integer() for tick in ticks)


def test_no_legend_covers_what_is_drawn(drawn):
    figure = drawn(14)
    for axis in figure.axes:
        legend, place = axis.get_legend().get_window_extent(), axis.get_window_extent()
        assert not legend.overlaps(place)
        assert not legend.overlaps(axis.xaxis.label.get_window_extent())
        assert min(legend.y0, legend.x0) >= 0
        assert legend.x1 <= figure.bbox.width
