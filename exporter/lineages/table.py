"""The README's tables of what is recognised and what is refused, made from the tuples that decide it.

python -m exporter.lineages.table README.md        puts them between the two comments that mark their place
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterable, Sequence

from engines.markdown_text import around_markers
from exporter.errors import UsageError
from exporter.lineages import LINEAGES, Lineage
from exporter.lineages.refused import REFUSED, RefusedFamily

BEGIN, END = "<!-- lineages -->", "<!-- /lineages -->"
STAGES = 5


def markdown_from_lineages(lineages: Sequence[Lineage]) -> str:
    """A table with a row for each lineage: its tensors in both forms, its blocks, and what its code is taken to do."""
    header = ("family", "training form", "deployed form", "classifier", "blocks", "assumed", "source")
    return _table(header, [_lineage_row(lineage) for lineage in lineages])


def markdown_from_refused(families: Sequence[RefusedFamily]) -> str:
    """A table with a row for each family that is refused; what to do instead is in the line that refuses it."""
    rows = [(family.name, _code(family.sample.partition(" ")[0])) for family in families]
    return _table(("refused by name", "known by, for example"), rows)


def with_tables(readme: str) -> str:
    """The README's text with the present tables in their place.

    Raises:
        UsageError: the comments that mark the place are not there, once each and in order.
    """
    around = around_markers(readme, BEGIN, END)
    if around is None:
        raise UsageError(f"the place of the tables is not marked; put {BEGIN} and {END} there, on lines of their own")
    before, after = around
    tables = f"{markdown_from_lineages(LINEAGES)}\n{markdown_from_refused(REFUSED)}"
    return f"{before}{BEGIN}\n{tables}{END}{after}"


def _lineage_row(lineage: Lineage) -> tuple[str, ...]:
    """The cells of a lineage; the last stride and the epsilon are in no file of it."""
    strides = ",".join(["2"] * (STAGES - 1) + [str(lineage.last_stride)])
    left_out = ", ".join(_code(dropped.glob) for dropped in lineage.dropped)
    return (
        lineage.title,
        _weights(lineage, "dense"),
        _weights(lineage, "fused"),
        "none, the feature map" if lineage.head is None else _code(f"{lineage.head}.weight"),
        "; ".join([*_block_words(lineage), *([f"left out: {left_out}"] if left_out else [])]),
        f"strides {strides}, eps {lineage.bn_eps:g}",
        lineage.source,
    )


def _weights(lineage: Lineage, ours: str) -> str:
    """The family's own names of a weight in the first block of its first stage; it may have several for one."""
    block = lineage.block.format(stage=lineage.first_stage, index=0)
    modules = [f"{theirs}.weight" for theirs, name in lineage.modules if name == ours]
    tensors = [theirs for theirs, name in lineage.modules if name == f"{ours}.weight"]
    return ", ".join(_code(f"{block}.{name}") for name in (*modules, *tensors))


def _block_words(lineage: Lineage) -> list[str]:
    """What sets the family's blocks apart, in words."""
    has = {ours for _, ours in lineage.modules}
    sizes = " and ".join(f"{size}x{size}" for size in lineage.kernels)
    words = [f"{lineage.family}: {sizes}"]
    if "dense1" in has:
        words.append("several branches of a size")
    if "post.bn" in has:
        words.append("a batch norm behind the sum, an identity without tensors")
    if "se.reduce" in has:
        words.append(f"SE {'behind' if lineage.se_after_activation else 'before'} the ReLU")
    return words


def _code(text: str) -> str:
    return f"`{text}`"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def main(arguments: Sequence[str]) -> None:
    """Writes the tables into the one file that ``arguments`` name."""
    (path,) = map(pathlib.Path, arguments)
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
