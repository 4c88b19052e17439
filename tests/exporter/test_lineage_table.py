"""The README's tables are those that the tuples make, and say of each family what its entry says."""

from __future__ import annotations

import dataclasses

import pytest

from exporter.errors import UsageError
from exporter.lineages import LINEAGES
from exporter.lineages.lineage import Dropped
from exporter.lineages.official import OFFICIAL
from exporter.lineages.refused import REFUSED
from exporter.lineages.table import BEGIN, END, main, markdown_from_lineages, markdown_from_refused, with_tables
from tests.conftest import ROOT, run_process

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = f"# A\n\n{BEGIN}\nold\n{END}\n\n# B\n"


def cells(table):
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]


def test_the_readme_has_the_tables_that_the_code_makes():
    assert with_tables(README) == README, "run: make table"


def test_every_family_has_one_row_and_all_rows_are_as_wide_as_the_header():
    for table, names in (
        (markdown_from_lineages(LINEAGES), [lineage.title for lineage in LINEAGES]),
        (markdown_from_refused(REFUSED), [family.name for family in REFUSED]),
    ):
        header, rule, *rows = cells(table)
        assert set(rule) == {"---"}
        assert [row[0] for row in rows] == names
        assert {len(row) for row in (header, rule, *rows)} == {len(header)}
        assert all(cell for row in rows for cell in row)


@pytest.mark.parametrize("lineage", LINEAGES, ids=lambda lineage: lineage.name)
def test_the_names_in_a_row_are_the_lineages_own(lineage):
    _, training, deployed, classifier, *_ = cells(markdown_from_lineages([lineage]))[2]
    for cell, ours in ((training, "dense.weight"), (deployed, "fused.weight")):
        names = cell.strip("`").split("`, `")
        assert lineage.foreign(f"stage1.0.{ours}") in names
        assert {lineage.canonical(name) for name in names} == {f"stage1.0.{ours}"}
    if lineage.head is None:
        assert classifier == "none, the feature map"
    else:
        assert lineage.canonical(classifier.strip("`")) == "head.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bn_eps": 1e-3}, "eps 0.001"),
        ({"last_stride": 1}, "strides 2,2,2,2,1"),
        ({"title": "another"}, "| another |"),
        ({"kernels": (5, 1)}, "5x5 and 1x1"),
        ({"head": "fc.last"}, "`fc.last.weight`"),
        ({"se_after_activation": True}, "SE behind the ReLU"),
        ({"dropped": (Dropped("aux|x.*", "a head"),)}, r"left out: `aux\|x.*`"),
        ({"source": "example.org, x.py"}, "example.org, x.py"),
        ({"block": "body.{stage}.{index}"}, "`body.1.0.rbr_dense.conv.weight`"),
        ({"modules": (("k", "dense"), ("f", "fused.weight"))}, "| `stage1.0.k.weight` | `stage1.0.f` |"),
        ({"modules": (("k", "dense"), ("l", "dense1"), ("f", "fused"))}, "several branches of a size"),
        ({"modules": (("k", "dense"), ("p", "post.bn"), ("f", "fused"))}, "a batch norm behind the sum"),
    ],
)
def test_what_an_entry_says_is_in_its_row(change, expected):
    """And not in the row of the entry without it."""
    changed = markdown_from_lineages([dataclasses.replace(OFFICIAL, **change)])
    assert expected in changed
    assert expected not in markdown_from_lineages([OFFICIAL])


def test_tables_replace_what_stands_between_the_marks_and_nothing_else():
    written = with_tables(PAGE)
    assert written.startswith(f"# A\n\n{BEGIN}\n| family |")
    assert written.endswith(f"|\n{END}\n\n# B\n")
    assert "old" not in written
    assert with_tables(written) == written


@pytest.mark.parametrize("page", ["", BEGIN, END, f"{END}{BEGIN}", PAGE + PAGE, PAGE + BEGIN, PAGE + END, END + PAGE])
def test_a_page_without_a_place_for_them_is_refused(page):
    with pytest.raises(UsageError, match="the place of the tables is not marked"):
        with_tables(page)


def test_the_command_writes_the_file(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    done = run_process(["-m", "exporter.lineages.table", page], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert page.read_text() == with_tables(PAGE)
    main([str(page)])
    assert page.read_text() == with_tables(PAGE)
