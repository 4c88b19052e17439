"""The README's table of verified GPUs is made from receipts that hold, and from no others."""

from __future__ import annotations

import copy
import json
import shutil

import pytest

from engines.errors import InputRejected, UsageError, VerificationFailed
from engines.files import sha256_of
from engines.receipts.verified_on import (
    BEGIN,
    END,
    HEADER,
    NONE,
    main,
    markdown_from_receipts,
    readme_with_table,
    with_table,
)
from tests.conftest import EXAMPLES, ROOT, run_process
from tests.engines.pretended_receipts import GPU, scaled, sealed, written_receipt

SHIPPED = sha256_of(EXAMPLES / "fashion.pt")
PAGE = f"# A\n\n{BEGIN}\nold\n{END}\n\n# B\n"
SHORT = {"batches": (1, 4), "duration": 0.1}


@pytest.fixture(scope="module")
def sound(fashion_export, tmp_path_factory):
    """The receipt of a pretended machine; no real one looks like it, and none is kept in the repository."""
    with written_receipt(fashion_export, tmp_path_factory.mktemp("sound"), **SHORT) as value:
        return value


@pytest.fixture
def project(tmp_path):
    """``project(value, ...)``: a directory with a README, the shipped network, and these receipts."""

    def make(*values):
        (tmp_path / "README.md").write_text(PAGE)
        (tmp_path / "examples" / "receipts").mkdir(parents=True)
        shutil.copy(EXAMPLES / "fashion.pt", tmp_path / "examples")
        for index, value in enumerate(values):
            (tmp_path / "examples" / "receipts" / f"card{index}.json").write_text(json.dumps(value))
        return tmp_path / "README.md"

    return make


def cells(table):
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]


# --- this project's README


def test_the_readme_has_the_table_that_the_receipts_make():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_with_table(ROOT / "README.md") == text, "run: make table"


def test_without_receipts_the_readme_says_that_nothing_is_verified(project):
    assert readme_with_table(project()) == f"# A\n\n{BEGIN}\n{NONE}{END}\n\n# B\n"
    assert NONE == "No receipt has arrived yet: nothing here is verified on any GPU.\n"


def test_the_directory_of_receipts_says_so_too_while_it_is_empty():
    text = (EXAMPLES / "receipts" / "README.md").read_text(encoding="utf-8")
    assert ("No receipt has arrived yet" in text) == (not list((EXAMPLES / "receipts").glob("*.json")))
    assert "make receipt" in text


# --- a receipt that holds makes a row


def test_a_sound_receipt_makes_a_row(sound, project):
    readme = project(sound)
    assert main([str(readme)]) == 0
    table = readme.read_text().partition(f"{BEGIN}\n")[2].partition(END)[0]
    header, _, row = cells(table)
    assert tuple(header) == HEADER
    figures = {
        json.loads(engine["sidecar"])["precision"]: engine["relative_error"]
        for engine in sound["exports"][0]["engines"]
    }
    rates = {
        (measured["file"], measured["batch"]): measured["images_per_second"]["value"]
        for measured in sound["exports"][0]["throughput"]["rows"]
        if measured["way"] == "CUDA graph, compute alone"
    }
    assert row == [
        f"{GPU} (sm86)",
        "580.65.06",
        "tensorrt 11.4.0.106",
        f"fp32 {figures['fp32']:.1e}, fp16 {figures['fp16']:.1e}",
        f"fashion.fp32 {rates['fashion.fp32.engine', 4]:.0f} (batch 4); "
        f"fashion.fp16 {rates['fashion.fp16.engine', 4]:.0f} (batch 4)",
        f"[{sound['date'][:10]}](examples/receipts/card0.json)",
    ]
    assert with_table(readme.read_text(), table) == readme.read_text()


def test_several_receipts_make_as_many_rows(sound, project):
    later = sealed({**sound, "date": "2031-01-02T03:04:05Z"})
    table = readme_with_table(project(sound, later))
    assert table.count(GPU) == 2
    assert "[2031-01-02](examples/receipts/card1.json)" in table


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("A | B", r"A \| B"),
        (f"A {END} B", "A &lt;!-- /verified-on --&gt; B"),
        ("[A](https://example.org)", r"\[A\](https://example.org)"),
    ],
    ids=["a column", "the mark of the end", "a link"],
)
def test_a_name_cannot_break_the_table(sound, tmp_path, name, shown):
    value = copy.deepcopy(sound)
    value["card"] = None
    value["machine"] |= {"gpu": name, "card": None}
    record = value["exports"][0]["throughput"]
    record["machine"] |= {"gpu": name, "card": None}
    for row in record["rows"]:
        row["bound"] = None
    (tmp_path / "card.json").write_text(json.dumps(sealed(value)))
    lines = markdown_from_receipts([tmp_path / "card.json"], SHIPPED).splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith(f"| {shown} (sm86) |")


# --- one that does not is an error, and the README stays as it was


@pytest.fixture(scope="module")
def failed(fashion_export, tmp_path_factory):
    """Of an engine with a fault."""
    with written_receipt(
        fashion_export, tmp_path_factory.mktemp("failed"), harm=scaled("head.weight"), **SHORT
    ) as value:
        return value


@pytest.fixture(scope="module")
def of_another(fashion_export, tmp_path_factory):
    """Of engines of another network, as they say themselves."""
    with written_receipt(fashion_export, tmp_path_factory.mktemp("other"), checkpoint="0" * 64, **SHORT) as value:
        return value


@pytest.fixture(scope="module")
def without_gpu(fashion_export, tmp_path_factory):
    with written_receipt(fashion_export, tmp_path_factory.mktemp("none"), with_gpu=False, **SHORT) as value:
        return value


def one_changed(value, *, seal):
    made = copy.deepcopy(value)
    made["exports"][0]["throughput"]["rows"][0]["images_per_second"]["value"] *= 2
    return sealed(made) if seal else made


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("failed", VerificationFailed, "FAIL: 9 of 11 checks hold, 2 not run: that is no verification"),
        ("of_another", VerificationFailed, "none of its exports is of fashion.pt, by its SHA-256"),
        ("without_gpu", VerificationFailed, "no GPU ran anything, so it verifies nothing"),
        ("forged", VerificationFailed, "images_per_second.value"),
        ("damaged", VerificationFailed, "digest: its SHA-256 is"),
        ("empty", InputRejected, "not JSON"),
    ],
)
def test_a_receipt_that_does_not_hold_makes_no_row(request, sound, project, kind, error, said):
    made = {"forged": one_changed(sound, seal=True), "damaged": one_changed(sound, seal=False)}
    value = made[kind] if kind in made else sound if kind == "empty" else request.getfixturevalue(kind)
    readme = project(sound, value)
    planted = readme.parent / "examples" / "receipts" / "card1.json"
    if kind == "empty":
        planted.write_text("")
    with pytest.raises(error, match=r"card1\.json: ") as raised:
        readme_with_table(readme)
    assert said in str(raised.value)
    done = run_process(["-m", "engines.receipts.verified_on", readme], ROOT) if kind == "failed" else None
    if done is not None:
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith("error: ")
    assert readme.read_text() == PAGE


def test_another_shipped_network_is_not_the_one_that_was_verified(sound, project):
    readme = project(sound)
    (readme.parent / "examples" / "fashion.pt").write_bytes(b"another")
    with pytest.raises(VerificationFailed, match=r"none of its exports is of fashion\.pt"):
        readme_with_table(readme)


@pytest.mark.parametrize(
    "page", ["no marks", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n", f"{BEGIN}\n{END}\n{END}\n"]
)
def test_the_place_must_be_marked_once(page):
    with pytest.raises(UsageError, match="is not marked"):
        with_table(page, NONE)
