"""What ``benchmarks/paper_table.py`` found, as data, as Markdown, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.paper_table_published import ACCURACY_SOURCE, SPEED_SOURCE, SPEED_UP_SOURCE, SPEED_UPS, TABLE
from engines.bench.plot import COLOURS, MARKERS, WIDTH, drawing, svg_from_figure
from engines.bench.record import FileRow, Row
from engines.bench.statistics import Estimate
from engines.bench.text import interval, speed_up_text
from engines.markdown_text import code, escaped, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING, DEPLOYED, FP16, INT8 = "training", "deployed", "fp16", "int8"
MODULE, FILE = "PyTorch", "file"
COLUMNS = (
    "network", "top-1 %", "form", "computed by", "parameters M", "MACs G", "images/s (95 %)",
    "speed-up over training (95 %)", "published images/s", "published speed-up", "parity",
)  # fmt: skip
MISSING = "-"
SERIES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("RepVGG-A", lambda name: name.startswith("RepVGG-A")),
    ("RepVGG-B", lambda name: name.startswith("RepVGG-B") and "g" not in name),
    ("RepVGG-B with groups", lambda name: name.startswith("RepVGG-B") and "g" in name),
    ("ResNet", lambda name: name.startswith("ResNet")),
)


@dataclasses.dataclass(frozen=True)
class FoundRow:
    """A form, run in one way. ``speedup`` is over the training form in the same way; there is a reason or a figure."""

    form: str
    computed_by: str
    parameters: int
    multiply_accumulates: int
    images_per_second: Estimate
    speedup: Estimate | None
    no_speedup: str | None
    passed: bool | None
    parity: str


@dataclasses.dataclass(frozen=True)
class Found:
    """One network: its rows, the bench record of its files as a JSON value, and what to know of it."""

    network: str
    rows: tuple[FoundRow, ...]
    record: dict[str, Any]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """All networks, how they were measured, and what must be said beside the figures."""

    found: tuple[Found, ...]
    settings: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def rows_from_bench(
    rows: Sequence[Row],
    files: Sequence[FileRow],
    forms: Mapping[str, str],
    computed_by: str,
    sizes: Mapping[str, tuple[int, int]],
) -> list[FoundRow]:
    """Rows of the benchmark as rows of the table.

    Args:
        rows: of one network, at one batch.
        files: what the rows are of, with their parity.
        forms: of each file.
        computed_by: MODULE or FILE.
        sizes: parameters and multiply-accumulates of the training form and the deployed one.
    """
    parities = {file.file: file for file in files}
    found = []
    for row in rows:
        form, file = forms[row.file], parities[row.file]
        by = computed_by if computed_by == MODULE else _backend(file, row)
        found.append(
            FoundRow(
                form,
                by,
                *sizes[TRAINING if form == TRAINING else DEPLOYED],
                row.images_per_second,
                row.speedup,
                row.no_speedup,
                file.parity.passed,
                file.parity.detail,
            )
        )
    return found


def markdown_from_table(found: Table, *, with_plot: bool) -> str:
    """The table as Markdown, with its sources and everything that limits what it says."""
    rows = [cells_of(one.network, row) for one in found.found for row in one.rows]
    record = found.found[0].record
    machine = [str(record["machine"][name]) for name in ("gpu", "cpu") if record["machine"].get(name)]
    settings = [
        ("machine", f"{', '.join(machine)}; {record['machine'].get('cores')} cores"),
        *found.settings,
        *((entry["name"], f"{entry['value']} ({entry['source']})") for entry in record["settings"]),
        *record["versions"].items(),
    ]
    parts = (
        "# RepVGG: parameters, arithmetic and speed",
        table(COLUMNS, rows),
        "![Published top-1 accuracy against measured images per second](accuracy_speed.svg)" if with_plot else "",
        f"Weights are random; accuracies are published ({escaped(ACCURACY_SOURCE)}), and so are the speeds beside "
        f"({escaped(SPEED_SOURCE)}; speed-up: {escaped(SPEED_UP_SOURCE)}). Parameters and multiply-accumulates are of "
        f"the form. {code(FILE)} rows are ONNX Runtime's, or an engine's; in the training form's file, Conv, "
        f"BatchNormalization and Add stand as in the module, and ONNX Runtime folds the batch norms as it opens it.",
        "\n".join(f"- {escaped(note)}" for note in found.notes),
        table(("setting", "value"), settings),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def cells_of(network: str, row: FoundRow) -> list[str]:
    """One row of the table, for COLUMNS."""
    published = TABLE.get(network)
    speed_up = SPEED_UPS.get(network) if row.form == DEPLOYED else None
    return [
        network,
        MISSING if published is None else f"{published.top1:.2f}",
        row.form,
        row.computed_by,
        f"{row.parameters / 1e6:.2f}",
        f"{row.multiply_accumulates / 1e9:.2f}",
        interval(row.images_per_second, f"{{:.{digits_of(row.images_per_second.value)}f}}".format),
        speed_up_text(row.speedup) if row.speedup is not None else row.no_speedup or MISSING,
        MISSING if published is None or row.form != DEPLOYED else str(published.images_per_second),
        MISSING if speed_up is None else f"{speed_up[1] / speed_up[0]:.2f}x ({speed_up[0]} to {speed_up[1]})",
        {True: "pass", False: f"FAIL: {row.parity}", None: f"not checked: {row.parity}"}[row.passed],
    ]


def json_from_table(found: Table) -> str:
    """Everything, with the bench record of each network."""
    sources = {"accuracy": ACCURACY_SOURCE, "speed": SPEED_SOURCE, "speed_up": SPEED_UP_SOURCE}
    published = {one.network: dataclasses.asdict(TABLE[one.network]) for one in found.found if one.network in TABLE}
    content = {"schema": 1, **dataclasses.asdict(found), "published": published, "sources": sources}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def svg_from_table(found: Table) -> bytes:
    """Published accuracy against the measured speed of the deployed float32 file.

    Raises:
        SdkMissing: matplotlib is not here.
    """
    with drawing():
        return svg_from_figure(figure_from_table(found))


def points_from_table(found: Table) -> dict[str, tuple[Estimate, float]]:
    """By network: images/s of the deployed float32 file, and top-1 in percent; none whose parity did not hold."""
    return {
        one.network: (row.images_per_second, TABLE[one.network].top1)
        for one in found.found
        for row in one.rows
        if one.network in TABLE and row.form == DEPLOYED and row.computed_by != MODULE and row.passed
    }


def figure_from_table(found: Table) -> Figure:
    """The plot, drawn but not written; inside ``drawing()``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 * WIDTH, 5), layout="constrained")
    axes = figure.subplots()
    points = points_from_table(found)
    for index, (title, belongs) in enumerate(SERIES):
        mine = sorted((point for name, point in points.items() if belongs(name)), key=lambda point: point[0].value)
        if not mine:
            continue
        speeds = [speed for speed, _ in mine]
        reach = ([s.value - s.low for s in speeds], [s.high - s.value for s in speeds])
        drawn = axes.errorbar(
            [speed.value for speed in speeds],
            [top1 for _, top1 in mine],
            xerr=reach,
            label=title,
            color=COLOURS[index],
            marker=MARKERS[index],
            linewidth=1.3,
        )
        drawn.lines[0].set_gid(f"series-{index}")
    for name, (speed, top1) in points.items():
        shown = name.removeprefix("RepVGG-")
        axes.annotate(shown, (speed.value, top1), xytext=(5, 4), textcoords="offset points")
    axes.set_xlim(left=0)
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel("images/s of the deployed float32 file, measured here; bars are 95 % intervals")
    axes.set_title("published ImageNet top-1, %", loc="left", fontsize=9)
    if points:
        axes.legend(loc="upper right")
    return figure


def digits_of(value: float) -> int:
    """Behind the point, so that there are at least three digits."""
    return 0 if value >= 100 else 1 if value >= 10 else 2


def _backend(file: FileRow, row: Row) -> str:
    """What computed a file, and how where there are several ways."""
    return "ONNX Runtime" if file.kind == "onnx" else f"engine, {row.way}"
