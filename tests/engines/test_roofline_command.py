"""``python -m engines roofline``: the predictions, marked as such; what it does not know it says in one line."""

from __future__ import annotations

import dataclasses
import json

import pytest

from engines.roofline import bound_of, works_of_file
from engines.roofline.cards import CARDS, card_from_key
from tests.engines.typed_graphs import Layer, TypedGraph

LAYERS = (Layer("stage0.0", 16, stride=2), Layer("stage1.0", 256, stride=2), Layer("stage1.1", 256))


@pytest.fixture
def graph(tmp_path):
    """``graph(name, free=False)``: the path of a small typed graph."""

    def make(name="net.onnx", *, free=False):
        model = TypedGraph("fp16").layers(*LAYERS).head(10).model(sizes="32x32:32x32:64x64" if free else None)
        if free:
            for axis, symbol in ((2, "height"), (3, "width")):
                model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = symbol
        (tmp_path / name).write_bytes(model.SerializeToString())
        return tmp_path / name

    return make


def rows(outcome):
    """The cells of the table's rows, by card and batch."""
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = [line.split("  ") for line in outcome.stdout.splitlines() if line.startswith("  ")]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {(row[0], int(row[1])): row[2:] for row in cells[1:]}


def test_each_row_is_the_bound_of_the_card_for_the_batch(engines_command, graph):
    path = graph()
    works = works_of_file(path)
    found = rows(engines_command("roofline", path, "--gpu", "l4,a100", "--batch", "1,64"))
    cards = [card_from_key(key) for key in ("l4", "a100")]
    assert list(found) == [(card.title, batch) for card in cards for batch in (1, 64)]
    for card in cards:
        for batch in (1, 64):
            bound = bound_of(works, card, batch)
            bound_kernels = {"arithmetic": bound.arithmetic_kernels, "memory": bound.memory_kernels}[bound.binds]
            least, *others = found[card.title, batch]
            assert float(least) == pytest.approx(bound.seconds * 1e3, rel=5e-3)
            assert others == [
                f"{batch / bound.seconds:.0f}",
                f"{bound.arithmetic_seconds / bound.seconds:.0%}",
                f"{bound.memory_seconds / bound.seconds:.0%}",
                f"{bound.binds} in {bound_kernels} of {len(works)} kernels",
            ]
    assert {row[-1].partition(" ")[0] for row in found.values()} == {"arithmetic", "memory"}


def test_predictions_say_that_nothing_was_measured_and_name_their_sources(engines_command, graph):
    path = graph()
    lines = engines_command("roofline", path, "--gpu", "l4").stdout.splitlines()
    assert lines[0].startswith("predicted, not measured: ")
    operations = 2 * (16 * 256 * 27 + 256 * 64 * 144 + 256 * 64 * 2304 + 2560)
    moved = (12288 + 8192) + (8192 + 32768) + 2 * 32768 + (32768 + 512) + (512 + 40)
    weights = 2 * (16 * 28 + 256 * 145 + 256 * 2305 + 2570)
    assert lines[1] == (
        f"{path}: 5 kernels, {operations / 1e9:.3g} G operations in fp16 and {moved / 1e6:.3g} MB of activations an "
        f"image, {weights / 1e6:.3g} MB of weights"
    )
    assert lines[-1] == f"NVIDIA L4: {'; '.join(card_from_key('l4').sources)}; {card_from_key('l4').notes}"


def test_without_a_card_all_are_predicted_for_the_usual_batches(engines_command, graph):
    found = rows(engines_command("roofline", graph()))
    assert list(found) == [(card.title, batch) for card in CARDS for batch in (1, 8, 32)]


def test_a_card_or_batch_given_twice_is_printed_once(engines_command, graph):
    assert list(rows(engines_command("roofline", graph(), "--gpu", "l4,L4", "--batch", "8,8"))) == [("NVIDIA L4", 8)]


def test_every_kernel_is_listed_on_demand(engines_command, graph):
    path = graph()
    outcome = engines_command("roofline", path, "--gpu", "l4", "--batch", "8", "--layers")
    lines = outcome.stdout.splitlines()
    start = lines.index(f"{path} on NVIDIA L4, batch 8:")
    listed = [line.split() for line in lines[start + 2 : -1]]
    works = works_of_file(path)
    assert [row[0] for row in listed] == [work.name for work in works]
    assert works[1].read_bytes + works[1].written_bytes == 8192 + 32768
    arithmetic, memory = 8 * works[1].operations / 121e12, (8 * 40960 + works[1].weight_bytes) / 300e9
    assert [listed[1][0], listed[1][1], listed[1][-1]] == ["stage1.0/Conv", "fp16", "memory"]
    figures = (8 * works[1].operations / 1e6, 8 * 40.96, works[1].weight_bytes / 1e3, arithmetic * 1e3, memory * 1e3)
    assert [float(cell) for cell in listed[1][2:-1]] == pytest.approx(figures, rel=5e-3)


def test_kernels_of_nanoseconds_are_told_in_digits_that_count(engines_command, graph):
    """In a small network nothing takes a microsecond, and only a kernel without products has no arithmetic."""
    path = graph()
    arguments = ("roofline", path, "--gpu", "a100", "--batch", "1", "--layers")
    (prediction,) = json.loads(engines_command(*arguments, "--json").stdout)["files"][0]["predictions"]
    lines = engines_command(*arguments).stdout.splitlines()
    cells = [line.split() for line in lines[lines.index(f"{path} on NVIDIA A100 SXM 80 GB, batch 1:") + 2 : -1]]
    assert prediction["milliseconds_at_least"] < 1e-2
    for layer, row in zip(prediction["layers"], cells, strict=True):
        told = [layer[f"{limit}_milliseconds"] for limit in ("arithmetic", "memory")]
        assert [float(cell) for cell in row[5:7]] == pytest.approx(told, rel=5e-3, abs=0)
        assert (row[5] == "0") == (layer["operations"] == 0)
        assert (row[4] == "0") == (layer["weight_bytes"] == 0)


def test_the_json_has_the_same_numbers(engines_command, graph):
    path = graph()
    outcome = engines_command("roofline", path, path, "--gpu", "t4", "--batch", "8", "--json", "--layers")
    record = json.loads(outcome.stdout)
    assert (record["schema"], record["measured"]) == (1, False)
    assert record["note"].startswith("predicted, not measured")
    assert len(record["files"]) == 2
    file, works = record["files"][0], works_of_file(path)
    assert file["file"] == str(path)
    assert (file["kernels"], file["precisions"]) == (5, ["fp16"])
    assert file["operations_per_image"] == sum(work.operations for work in works)
    assert file["weight_bytes"] == sum(work.weight_bytes for work in works)
    assert file["activation_bytes_per_image"] == sum(work.read_bytes + work.written_bytes for work in works)
    (prediction,) = file["predictions"]
    bound = bound_of(works, card_from_key("t4"), 8)
    assert prediction["milliseconds_at_least"] == pytest.approx(bound.seconds * 1e3)
    assert prediction["images_per_second_at_most"] == pytest.approx(8 / bound.seconds)
    assert prediction["arithmetic_share"] + prediction["memory_share"] == pytest.approx(1)
    assert prediction["kernels_bound_by"] == {"arithmetic": bound.arithmetic_kernels, "memory": bound.memory_kernels}
    longest = [max(layer["arithmetic_milliseconds"], layer["memory_milliseconds"]) for layer in prediction["layers"]]
    assert sum(longest) == pytest.approx(prediction["milliseconds_at_least"])
    bare = json.loads(engines_command("roofline", path, "--gpu", "t4", "--batch", "8", "--json").stdout)
    assert "layers" not in bare["files"][0]["predictions"][0]


def test_a_precision_without_a_peak_is_said_and_the_other_cards_are_predicted(engines_command, graph, monkeypatch):
    card = card_from_key("l4")
    peaks = {**card.operations_per_second, "fp16": None}
    unknown = dataclasses.replace(card, key="x", title="X", operations_per_second=peaks)
    monkeypatch.setattr("engines.roofline.cards.CARDS", (unknown, card))
    path = graph()
    found = rows(engines_command("roofline", path, "--batch", "1"))
    assert found["X", 1] == ["-", "-", "-", "-", "no peak of fp16 is known for X"]
    assert found["NVIDIA L4", 1][0] != "-"
    record = json.loads(engines_command("roofline", path, "--batch", "1", "--json").stdout)
    assert record["files"][0]["predictions"][0] == {
        "card": "x", "title": "X", "batch": 1, "unknown": "no peak of fp16 is known for X",
    }  # fmt: skip


def test_an_engine_is_predicted_from_the_graph_beside_it(engines_command, fashion):
    engine, onnx = (
        engines_command("roofline", fashion / f"fashion.fp16.{kind}", "--gpu", "l4") for kind in ("engine", "onnx")
    )
    assert rows(engine) == rows(onnx)
    (fashion / "fashion.fp16.onnx").unlink()
    outcome = engines_command("roofline", fashion / "fashion.fp16.engine")
    assert (outcome.code, outcome.stdout) == (3, "")
    assert "fashion.fp16.onnx or fashion.fp16.rtx.onnx, is not beside it; put it there" in outcome.error


def test_a_graph_of_any_size_is_predicted_for_the_one_that_is_given(engines_command, graph):
    fixed, free = graph(), graph("free.onnx", free=True)
    given = engines_command("roofline", free, "--gpu", "l4", "--size", "32")
    assert rows(given) == rows(engines_command("roofline", fixed, "--gpu", "l4"))
    assert rows(engines_command("roofline", free, "--gpu", "l4", "--size", "64x32")) != rows(given)


def test_names_that_a_terminal_would_act_on_are_spelled_out(engines_command, graph, tmp_path):
    path = graph()
    path.write_bytes(path.read_bytes().replace(b"stage0.0/Conv", b"stage0\x1b[0mConv"[:13]))
    outcome = engines_command("roofline", path, "--gpu", "l4", "--batch", "1", "--layers")
    assert outcome.code == 0
    assert "\x1b" not in outcome.stdout
    assert r"stage0\x1b" in outcome.stdout


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["--gpu", "l5"], 2, r"--gpu l5: unknown; did you mean l4? Known: t4, l4, l40s,"),
    (["--gpu", "l4,"], 2, "unknown; did you mean"),
    (["--batch", "0"], 2, "--batch: give whole numbers from 1 to 65536, with commas"),
    (["--batch", "8:32"], 2, "--batch: '8:32' is not whole numbers"),
    (["--batch", "65537"], 2, "give whole numbers from 1 to 65536"),
    (["--size", "x"], 2, "--size: 'x' is not"),
    (["--size", "32:64:96"], 2, "--size: '32:64:96' is not one size"),
    (["--size", "5000"], 2, "--size 5000x5000: give N or HxW, from 1 to 4096"),
    (["--size", "0"], 2, "--size 0x0: give N or HxW, from 1 to 4096"),
    (["--size", "64"], 3, "input takes images of 32x32, not 64x64; leave out --size"),
])  # fmt: skip
def test_what_cannot_be_predicted_is_one_line_and_nothing_else(engines_command, graph, arguments, code, said):
    outcome = engines_command("roofline", graph(), *arguments)
    assert (outcome.code, outcome.stdout) == (code, "")
    assert said in outcome.error


def test_a_graph_of_any_size_without_one_and_files_that_are_none_are_refused(engines_command, graph, tmp_path):
    free = engines_command("roofline", graph("free.onnx", free=True))
    assert (free.code, free.stdout) == (3, "")
    assert "free.onnx: input (?, 3, ?, ?) has extents that are not known; give the size of images" in free.error
    missing = engines_command("roofline", tmp_path / "missing.onnx")
    assert (missing.code, "no such file" in missing.error) == (3, True)
    (tmp_path / "text.onnx").write_text("no graph")
    foreign = engines_command("roofline", graph(), tmp_path / "text.onnx")
    assert (foreign.code, foreign.stdout, "not a whole ONNX file" in foreign.error) == (3, "", True)
