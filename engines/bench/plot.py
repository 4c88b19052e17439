"""A bench record as a picture: images/s and latency against batch, with their 95 % intervals.

There is a curve for each file and way of running it: colour and marker are the file's, the dashes are the way's. The
latency is of the highest percentile that every row has, so that all points of the picture are of one kind; the axis
says which it is. Throughput begins at zero, so that distances are differences; latency is on a logarithmic axis, where
equal distances are equal ratios. A record of one batch has no curves: then each file and way is a line of its own.

The same record always gives the same bytes, whatever the user's matplotlib is set to. Text stays text, and the
background is white, for pages that are dark.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from engines.bench.curves import Curve, latency_curves, plain_line, short_names, throughput_curves
from engines.bench.record import Record
from engines.bench.statistics import PERCENTILES
from engines.errors import SdkMissing, first_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart, without the yellow, which is lost on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One more than colours, so that the two together repeat late."""
DASHES = ("solid", "dashed", "dashdot", "dotted")
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "repvgg",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "errorbar.capsize": 2.5,
    "lines.markersize": 5,
    "legend.frameon": False,
}
WIDTH = 10.0
MARGIN = 1.6
"""Around logarithms; its square is more than any step between 1, 2, 5 and 10."""
LEGEND_CHARACTERS = 130
"""As many fit beside each other under the picture."""
LONGEST_NAME = 45
"""Of a file, in characters: with a way beside it, it leaves the panels room."""


def svg_from_record(record: Record) -> bytes:
    """The picture.

    Raises:
        SdkMissing: matplotlib is not here.
    """
    with drawing():
        return svg_from_figure(figure_from_record(record))


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Inside, figures are made and written as SETTINGS say, and as nothing else does.

    Raises:
        SdkMissing: matplotlib is not here.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SdkMissing(
            f"a plot needs matplotlib, which is not installed here or does not start ({first_line(error)}); "
            f"pip install 'repvgg-exporter[plot]'"
        ) from error
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")  # the reader's font may have it
        yield


def svg_from_figure(figure: Figure) -> bytes:
    """A figure as SVG, the same at every run; inside ``drawing()``."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def figure_from_record(record: Record) -> Figure:
    """The picture, drawn but not written; inside ``drawing()``."""
    from matplotlib.figure import Figure

    throughput = throughput_curves(record.rows)
    percentile, latency = latency_curves(record.rows)
    label = "latency: too few queries" if percentile is None else f"p{percentile} latency, ms"
    if percentile not in (None, PERCENTILES[-1]):
        label += f" (too few queries for p{PERCENTILES[-1]})"
    styles = _Styles(throughput)
    batches = sorted({row.batch for row in record.rows})
    alone = len(batches) == 1
    figure = Figure(figsize=(WIDTH, 1.3 + 0.3 * len(throughput) if alone else 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=alone)
    figure.suptitle(_title(record, styles, batches), fontsize=10)
    if alone:
        _draw_lines(left, "images", throughput, styles, "images/s")
        _draw_lines(right, "latency", latency, styles, label)
        return figure
    _draw_curves(left, "images", throughput, styles, "images/s", batches)
    left.set_ylim(bottom=0)
    _draw_curves(right, "latency", latency, styles, f"{label}, logarithmic" if percentile else label, batches)
    _make_logarithmic(right, latency)
    handles = styles.handles()
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    columns = max(1, min(len(handles), LEGEND_CHARACTERS // (longest + 8)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


class _Styles:
    """Which look belongs to which file and way, in their order in the record."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.ways = list(dict.fromkeys(curve.way for curve in curves))
        self._names = short_names([curve.file for curve in curves], LONGEST_NAME)
        self._files = list(self._names)

    def of_file(self, file: str) -> dict[str, Any]:
        """Colour and marker."""
        index = self._files.index(file)
        return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}

    def of_way(self, way: str) -> dict[str, Any]:
        """Dashes."""
        return {"linestyle": DASHES[self.ways.index(way) % len(DASHES)]}

    def name(self, curve: Curve) -> str:
        """The curve's file, and its way where there are several."""
        name = self._names[curve.file]
        return name if len(self.ways) == 1 else f"{name}, {plain_line(curve.way)}"

    def handles(self) -> list[Line2D]:
        """What the legend shows: the files, then the ways where there are several."""
        from matplotlib.lines import Line2D

        looks = [{"label": name, "linestyle": "none"} | self.of_file(file) for file, name in self._names.items()]
        if len(self.ways) > 1:
            looks += [{"label": plain_line(way), "color": "#555555"} | self.of_way(way) for way in self.ways]
        return [Line2D([], [], **look) for look in looks]


def _draw_curves(
    axes: Axes, panel: str, curves: Sequence[Curve], styles: _Styles, label: str, batches: Sequence[int]
) -> None:
    """One panel of several batches."""
    from matplotlib.ticker import NullLocator

    for index, curve in enumerate(curves):
        values, below, above = _columns(curve)
        drawn = axes.errorbar(
            list(curve.estimates),
            values,
            yerr=(below, above),
            linewidth=1.3,
            **styles.of_file(curve.file) | styles.of_way(curve.way),
        )
        drawn.lines[0].set_gid(f"{panel}-{index}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_title(label, loc="left", fontsize=9)


def _draw_lines(axes: Axes, panel: str, curves: Sequence[Curve], styles: _Styles, label: str) -> None:
    """One panel of a single batch: a line for each file and way, the first one on top."""
    for index, curve in enumerate(curves):
        values, below, above = _columns(curve)
        drawn = axes.errorbar(values, [index], xerr=(below, above), linestyle="none", **styles.of_file(curve.file))
        drawn.lines[0].set_gid(f"{panel}-{index}")
        axes.annotate(
            f"{values[0]:.3g}" if values[0] < 1000 else f"{values[0]:,.0f}",
            (values[0], index),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    if curves:
        axes.set_yticks(range(len(curves)), [styles.name(curve) for curve in curves])
        axes.set_ylim(len(curves) - 0.5, -0.7)
        axes.set_xlim(0, 1.08 * max(estimate.high for curve in curves for estimate in curve.estimates.values()) or 1)
    axes.set_title(label, loc="left", fontsize=9)


def _make_logarithmic(axes: Axes, curves: Sequence[Curve]) -> None:
    """A y axis with ticks at 1, 2, 5, 10 and so on, at least one of them in its range; not where there is a zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    estimates = [estimate for curve in curves for estimate in curve.estimates.values()]
    ends = [end for estimate in estimates for end in (estimate.low, estimate.high)]
    if not ends or min(ends) <= 0:
        return
    axes.set_yscale("log")
    axes.set_ylim(min(ends) / MARGIN, max(ends) * MARGIN)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _columns(curve: Curve) -> tuple[list[float], list[float], list[float]]:
    """Values, and how far the interval reaches below and above each."""
    estimates = curve.estimates.values()
    return (
        [estimate.value for estimate in estimates],
        [estimate.value - estimate.low for estimate in estimates],
        [estimate.high - estimate.value for estimate in estimates],
    )


def _title(record: Record, styles: _Styles, batches: Sequence[int]) -> str:
    """The machine, what is the same for all curves, and what the bars are."""
    names = (record.machine["cpu"], record.machine["gpu"])
    on = " and ".join(plain_line(name) for name in names if name) or "an unnamed machine"
    same = [f"batch {batches[0]}"] if len(batches) == 1 else []
    same += [plain_line(styles.ways[0])] if len(styles.ways) == 1 else []
    return ", ".join([f"Throughput and latency on {on}", *same]) + "; bars are 95 % intervals"
