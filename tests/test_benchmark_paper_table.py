"""The paper's table: what its networks are, that a wrong answer gets no speed-up, and every figure in its cell."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import sys
import textwrap
import xml.etree.ElementTree as ET

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import exporter
from benchmarks import paper_table, paper_table_networks, paper_table_text
from benchmarks.paper_table_eager import measured_modules
from benchmarks.paper_table_measure import Wanted, engines_for, found_of_repvgg, found_of_resnet
from benchmarks.paper_table_networks import (
    deployed_module,
    multiply_accumulates_of,
    parameters_of,
    random_network,
    timm_problem,
    variant_from_title,
    write_golden_vectors,
    write_training_form,
)
from benchmarks.paper_table_text import COLUMNS, DEPLOYED, INT8, MODULE, TRAINING, Found, FoundRow, Table
from benchmarks.plain_export import RepVGG
from engines.bench import rounds
from engines.bench.statistics import Estimate
from engines.errors import CompilerRefused, InputRejected, SdkMissing, UsageError
from engines.golden import golden_from_file
from engines.parity import GATES
from exporter.checkpoint import checkpoint_from_path
from exporter.repvgg import network_from_checkpoint
from exporter.request import Request
from exporter.variants import Variant
from exporter.workload import multiply_accumulates
from tests.networks import NaiveRepVGG, Shape

SIZE, CLASSES = 32, 10
TINY = Variant("tiny", "RepVGG", (1, 2, 2, 1, 1), (8, 8, 12, 16, 16))
GROUPED = dataclasses.replace(TINY, name="tinyg2", groups=2)
QUICK = Wanted(batch=2, size=SIZE, duration=0.01, provider=None, classes=CLASSES)


@pytest.fixture(scope="module", autouse=True)
def _short_slices():
    """How long is measured is no matter here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WARM_UP", 0.01), ("SLICE", 0.005), ("MOST_WINDOWS", 3)):
            patch.setattr(rounds, name, value)
        yield


@pytest.fixture(scope="module")
def measured_folder(tmp_path_factory):
    """A grouped network, measured whole, and the directory of its files."""
    folder = tmp_path_factory.mktemp("paper")
    return found_of_repvgg(GROUPED, QUICK, folder), folder


# --- the networks


@pytest.mark.parametrize("variant", [TINY, GROUPED])
def test_the_random_network_is_the_naive_one_of_its_tensors(variant):
    model = random_network(variant, CLASSES)
    naive = NaiveRepVGG(Shape(variant.depths, variant.widths, classes=CLASSES, even_groups=variant.groups))
    naive.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, SIZE, SIZE)
    assert torch.allclose(model.double()(images.double()), naive.answer(images), rtol=1e-12)
    again = random_network(variant, CLASSES).state_dict()
    assert all(torch.equal(tensor, again[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("variant", [TINY, GROUPED])
def test_the_training_form_is_written_with_every_branch_and_batch_norm(variant, tmp_path):
    model = random_network(variant, CLASSES)
    path = write_training_form(model, SIZE, tmp_path / "training.onnx")
    graph = onnx.load(path).graph
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    blocks = len(variant.blocks)
    assert norms == 2 * blocks + 2  # two blocks keep their shape
    assert collections.Counter(node.op_type for node in graph.node) == {
        "Conv": 2 * blocks, "BatchNormalization": norms, "Add": blocks + 2, "Relu": blocks,
        "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1,
    }  # fmt: skip
    groups = {attribute.i for node in graph.node for attribute in node.attribute if attribute.name == "group"}
    assert groups == {1, variant.groups}
    images = np.random.default_rng(0).standard_normal((3, 3, SIZE, SIZE), np.float32)
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": images})
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(images).double()).numpy()
    assert np.abs(found - expected).max() < 5e-6 * np.abs(expected).max()


def test_the_deployed_module_has_the_weights_of_the_file(measured_folder):
    _, folder = measured_folder
    path = folder / "RepVGG-tinyg2.onnx"
    module = deployed_module(path)
    assert [type(layer) for layer in module][:4] == [nn.Conv2d, nn.ReLU] * 2
    written = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    held = [parameter.detach().numpy() for parameter in module.parameters()]
    assert len(held) == len(written)
    assert all(np.array_equal(one, other) for one, other in zip(held, written.values(), strict=True))


def test_the_training_form_is_no_deployed_one(measured_folder):
    _, folder = measured_folder
    with pytest.raises(InputRejected, match="has a BatchNormalization, which no deployed RepVGG has"):
        deployed_module(folder / "RepVGG-tinyg2.training.onnx")


def test_multiply_accumulates_are_those_of_the_shapes(measured_folder):
    _, folder = measured_folder
    path = folder / "RepVGG-tinyg2.pt"
    request = Request(path=path, out=folder, size=(SIZE, SIZE))
    architecture = network_from_checkpoint(checkpoint_from_path(path, None), request).architecture
    deployed = deployed_module(folder / "RepVGG-tinyg2.onnx")
    assert multiply_accumulates_of(deployed, SIZE) == multiply_accumulates(architecture, (SIZE, SIZE))
    one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    assert multiply_accumulates_of(one, 10) == 5 * 5 * 8 * 27 + 8 * 5
    assert parameters_of(one) == 8 * 27 + 8 + 8 * 5 + 5


@pytest.mark.parametrize(("name", "millions"), [("A0", 9.109), ("B0", 15.817)])
def test_the_published_networks_have_the_published_parameters(name, millions):
    variant = variant_from_title(name)
    with torch.device("meta"):
        assert parameters_of(RepVGG(variant.depths, variant.widths)) / 1e6 == pytest.approx(millions, abs=1e-3)


# --- one network, measured


def test_every_form_is_measured_and_judged(measured_folder):
    found, folder = measured_folder
    assert [(row.form, row.computed_by) for row in found.rows] == [
        (TRAINING, MODULE), (DEPLOYED, MODULE),
        (TRAINING, "ONNX Runtime"), (DEPLOYED, "ONNX Runtime"), (INT8, "ONNX Runtime"),
    ]  # fmt: skip
    assert [row.passed for row in found.rows] == [True] * 5, [row.parity for row in found.rows]
    assert all(row.images_per_second.value > 0 for row in found.rows)
    training, deployed = found.rows[:2]
    assert training.parameters == parameters_of(random_network(GROUPED, CLASSES))
    assert deployed.parameters == parameters_of(deployed_module(folder / "RepVGG-tinyg2.onnx")) < training.parameters
    assert deployed.multiply_accumulates < training.multiply_accumulates
    assert found.rows[4].parameters == deployed.parameters
    assert [file["file"] for file in found.record["files"]] == [
        f"RepVGG-tinyg2{ending}.onnx" for ending in (".training", "", ".int8")
    ]
    for row in found.rows[1:2] + found.rows[3:]:
        assert (row.speedup is None) != (row.no_speedup is None)


class Clock:
    """Time that passes only in modules."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Timed(nn.Module):
    """A module that takes ``seconds`` by the clock, and errs by ``error``."""

    def __init__(self, inner, clock, seconds, error=0.0):
        super().__init__()
        self.inner, self.clock, self.seconds, self.error = inner, clock, seconds, error

    def forward(self, x):
        self.clock.now += self.seconds
        return self.inner(x) * (1 + self.error)


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ((0.0, 0.0), None),
        ((0.0, 1e-3), "deployed: parity failed"),
        ((1e-3, 0.0), "training: parity failed"),
        ((0.0, float("nan")), "deployed: parity failed"),
    ],
)
def test_a_module_with_wrong_answers_gets_no_speed_up(errors, reason, tmp_path):
    model, clock = random_network(TINY, CLASSES), Clock()
    golden = golden_from_file(write_golden_vectors(model, SIZE, tmp_path))
    modules = {
        name: Timed(model, clock, seconds, error)
        for name, seconds, error in zip((TRAINING, DEPLOYED), (0.25, 0.125), errors, strict=True)
    }
    rows, files = measured_modules(modules, golden, GATES["fp32"], batch=6, duration=0.5, clock=clock)
    assert [row.images_per_second.value for row in rows] == pytest.approx([24.0, 48.0])
    assert [row.first_seconds for row in rows] == [0.25, 0.125]
    assert [file.parity.passed for file in files] == [not error for error in errors]
    assert rows[1].no_speedup == reason
    if reason is None:
        assert dataclasses.astuple(rows[1].speedup) == pytest.approx((2.0, 2.0, 2.0))
        assert rows[1].against == TRAINING
    else:
        assert rows[1].speedup is None


def test_equally_fast_modules_have_no_speed_up(tmp_path):
    model, clock = random_network(TINY, CLASSES), Clock()
    golden = golden_from_file(write_golden_vectors(model, SIZE, tmp_path))
    modules = {name: Timed(model, clock, 0.25) for name in (TRAINING, DEPLOYED)}
    rows, _ = measured_modules(modules, golden, GATES["fp32"], batch=1, duration=0.5, clock=clock)
    assert rows[1].speedup is None
    assert rows[1].no_speedup == "1.00x (1.00 to 1.00) cannot be told from 1"


def test_engines_are_exported_for_fp16_and_int8_and_a_refusal_is_noted(measured_folder, tmp_path, monkeypatch):
    _, folder = measured_folder
    asked = []

    def export(checkpoint, out, **options):
        asked.append((out.name, options["trt"], options["batch"], options["calibration"].name))
        if options["trt"] == ("int8",):
            raise CompilerRefused("no INT8 today")

    monkeypatch.setattr(exporter, "export", export)
    found, notes = engines_for(
        folder / "RepVGG-tinyg2.pt", folder / "images.npz", dataclasses.replace(QUICK, batch=64), folder
    )
    assert asked == [(name, (name,), (1, 64, 64), "images.npz") for name in ("fp16", "int8")]
    assert found == {"fp16": folder / "fp16" / "RepVGG-tinyg2.fp16.engine"}
    assert notes == ["RepVGG-tinyg2: no int8 engine: no INT8 today"]


# --- ResNets


FAKE_TIMM = """
    import torch
    from torch import nn

    def create_model(name, pretrained, zero_init_last):
        assert (name, pretrained, zero_init_last) == ("resnet18", False, False)
        head = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), *head)
"""


@pytest.fixture
def timm_that(tmp_path, monkeypatch):
    """Puts a package of that name, with this content, before any other."""

    def put(content):
        (tmp_path / "packages").mkdir()
        (tmp_path / "packages" / "timm.py").write_text(textwrap.dedent(content))
        monkeypatch.syspath_prepend(tmp_path / "packages")
        monkeypatch.delitem(sys.modules, "timm", raising=False)

    yield put
    sys.modules.pop("timm", None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PyTorch's exporter, about itself
def test_a_resnet_is_its_module_and_its_file_without_batch_norms(timm_that, tmp_path):
    timm_that(FAKE_TIMM)
    found = found_of_resnet("ResNet-18", QUICK, tmp_path)
    assert [(row.form, row.computed_by, row.passed) for row in found.rows] == [
        (TRAINING, MODULE, True), (DEPLOYED, "ONNX Runtime", True),
    ]  # fmt: skip
    convolution, head = 8 * 27, 8 * 10 + 10
    assert [row.parameters for row in found.rows] == [convolution + 16 + head, convolution + 8 + head]
    assert {row.multiply_accumulates for row in found.rows} == {16 * 16 * convolution + 80}
    kinds = {node.op_type for node in onnx.load(tmp_path / "ResNet-18.onnx").graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds


def test_without_timm_the_resnets_are_left_out_and_a_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    networks = paper_table.networks_from_text(None)
    assert networks == paper_table.NETWORKS[:9]
    monkeypatch.setattr(paper_table, "found_of_repvgg", lambda variant, *_: Found(variant.title, (), {}, ()))
    table, errors = paper_table.table_from_networks(networks[:1], QUICK, lambda _: None)
    assert errors == []
    assert "There are no ResNets: timm is not installed here (pip install timm)." in table.notes
    assert paper_table.NO_FP16 in table.notes
    with pytest.raises(UsageError, match="timm is not installed here"):
        paper_table.networks_from_text("ResNet-18")
    with pytest.raises(SdkMissing, match="ResNet-18: timm is not installed here"):
        paper_table_networks.resnet("ResNet-18")


def test_a_timm_that_does_not_start_is_none(timm_that):
    timm_that("raise RuntimeError('operator torchvision::nms does not exist')")
    assert timm_problem() == "timm does not start here (operator torchvision::nms does not exist)"
    assert paper_table.networks_from_text(None) == paper_table.NETWORKS[:9]


def test_with_timm_no_line_says_that_it_is_missing(timm_that, monkeypatch):
    timm_that(FAKE_TIMM)
    assert paper_table.networks_from_text(None) == paper_table.NETWORKS
    monkeypatch.setattr(paper_table, "found_of_repvgg", lambda variant, *_: Found(variant.title, (), {}, ()))
    table, _ = paper_table.table_from_networks(["RepVGG-A0"], QUICK, lambda _: None)
    assert not any("ResNet" in note for note in table.notes)


# --- which networks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A9", "A9: unknown; choose from RepVGG-A0"),
        ("D2se", "unknown"),
        ("A0,RepVGG-A0", "one is named twice"),
        ("", "unknown"),
    ],
)
def test_networks_that_are_not_there_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        paper_table.networks_from_text(text)


def test_networks_are_named_either_way():
    assert paper_table.networks_from_text("B1g4, RepVGG-A0") == ("RepVGG-B1g4", "RepVGG-A0")
    assert variant_from_title("B2g4").groups == 4


# --- the table


def estimate(value):
    return Estimate(value, 0.98 * value, 1.02 * value)


def row(form, computed_by, rate, *, speedup=None, no_speedup=None, passed=True):
    return FoundRow(form, computed_by, 8_309_384, 1_362_000_000, estimate(rate), speedup, no_speedup, passed, "why")


RECORD = {
    "machine": {"cpu": "Some CPU", "cores": 2, "gpu": None, "host": "SECRETHOST"},
    "settings": [{"name": "provider", "value": "cpu", "source": "default"}],
    "versions": {"onnxruntime": "1.31.1"},
}
B0 = Found(
    "RepVGG-B0",
    (
        row(TRAINING, MODULE, 20.0),
        row(DEPLOYED, MODULE, 30.0, speedup=Estimate(1.5, 1.45, 1.55)),
        row(TRAINING, "ONNX Runtime", 40.0),
        row(DEPLOYED, "ONNX Runtime", 50.0, no_speedup="1.02x (0.99 to 1.05) cannot be told from 1"),
        row(INT8, "ONNX Runtime", 60.0, no_speedup="b0.int8.onnx: parity failed", passed=False),
    ),
    RECORD,
    ("RepVGG-B0: did not settle",),
)
A0 = Found("RepVGG-A0", (row(DEPLOYED, "ONNX Runtime", 100.0),), RECORD, ())
FAILED = Found("RepVGG-A1", (row(DEPLOYED, "ONNX Runtime", 75.0, passed=False),), RECORD, ())
TABLE = Table((B0, A0, FAILED), (("images", "noise"),), ("a note <x>",))


def cells_by_form(found):
    return [dict(zip(COLUMNS, paper_table_text.cells_of(found.network, one), strict=True)) for one in found.rows]


def test_cells_have_the_figures_measured_and_published():
    training, deployed, _, file, int8 = cells_by_form(B0)
    assert list(deployed.values()) == [
        "RepVGG-B0", "75.14", "deployed", "PyTorch", "8.31", "1.36", "30.0 (29.4 to 30.6)", "1.50x (1.45 to 1.55)",
        "1817", "1.71x (1061 to 1810)", "pass",
    ]  # fmt: skip
    assert [training[name] for name in COLUMNS[7:]] == ["-", "-", "-", "pass"]
    assert file["speed-up over training (95 %)"] == "1.02x (0.99 to 1.05) cannot be told from 1"
    assert int8["speed-up over training (95 %)"] == "b0.int8.onnx: parity failed"
    assert int8["parity"] == "FAIL: why"
    assert cells_by_form(A0)[0]["published speed-up"] == "-"  # none is published


def test_the_markdown_has_every_row_the_sources_and_the_notes():
    text = paper_table_text.markdown_from_table(TABLE, with_plot=True)
    rows = [line for line in text.splitlines() if line.startswith("| RepVGG-")]
    assert len(rows) == 7
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(COLUMNS) + 1 for line in rows)
    assert "Ding et al., CVPR 2021, table 4: GTX 1080 Ti, float32, batch 128, deployed" in text
    assert "- a note &lt;x&gt;" in text
    assert "| provider | cpu (default) |" in text
    assert "| machine | Some CPU; 2 cores |" in text
    assert "SECRET" not in text
    assert "](accuracy_speed.svg)" in text
    assert "accuracy_speed" not in paper_table_text.markdown_from_table(TABLE, with_plot=False)


def test_the_json_has_everything():
    content = json.loads(paper_table_text.json_from_table(TABLE))
    assert content["schema"] == 1
    assert [one["network"] for one in content["found"]] == ["RepVGG-B0", "RepVGG-A0", "RepVGG-A1"]
    assert content["found"][0]["rows"][1]["speedup"] == {"value": 1.5, "low": 1.45, "high": 1.55}
    assert content["found"][0]["record"] == RECORD
    assert content["published"]["RepVGG-A0"] == {"top1": 72.41, "images_per_second": 3256}
    assert set(content["sources"]) == {"accuracy", "speed", "speed_up"}


def test_the_plot_has_the_deployed_float32_files_whose_parity_held():
    assert paper_table_text.points_from_table(TABLE) == {
        "RepVGG-B0": (estimate(50.0), 75.14),
        "RepVGG-A0": (estimate(100.0), 72.41),
    }
    svg = paper_table_text.svg_from_table(TABLE)
    assert svg == paper_table_text.svg_from_table(TABLE)
    name = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring(svg)
    shown = {"".join(node.itertext()).strip() for node in root.iter(f"{name}text")}
    assert {"A0", "B0", "RepVGG-A", "RepVGG-B", "published ImageNet top-1, %"} <= shown
    assert not {"A1", "ResNet"} & shown
    places = {
        group.get("id"): [(float(use.get("x")), float(use.get("y"))) for use in group.iter(f"{name}use")]
        for group in root.iter(f"{name}g")
        if (group.get("id") or "").startswith("series-")
    }
    ((a0,), (b0,)) = places["series-0"], places["series-1"]
    assert a0[0] > b0[0]  # faster
    assert a0[1] > b0[1]  # less accurate: SVG counts from the top


# --- the command


def test_a_network_that_fails_does_not_take_the_others_along(tmp_path, monkeypatch, capsys):
    def measure(variant, wanted, directory):
        assert directory.is_dir()
        used.append(directory)
        if variant.title == "RepVGG-A1":
            raise SdkMissing("A1 is out of order")
        return dataclasses.replace(B0, network=variant.title)

    used = []
    monkeypatch.setattr(paper_table, "found_of_repvgg", measure)
    code = paper_table.main(["--networks", "A1,B0", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert code == 4
    assert "- Left out: A1 is out of order" in printed.out
    assert "1 of 2: RepVGG-A1 left out: A1 is out of order" in printed.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "accuracy_speed.svg",
        "table.json",
        "table.md",
    ]
    assert (tmp_path / "out" / "table.md").read_text() == printed.out
    assert len(set(used)) == 2
    assert not any(path.exists() for path in used)


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch, capsys):
    def measure(variant, *_):
        if variant.title == "RepVGG-A2":
            raise KeyboardInterrupt
        return dataclasses.replace(B0, network=variant.title)

    monkeypatch.setattr(paper_table, "found_of_repvgg", measure)
    with pytest.raises(KeyboardInterrupt):
        paper_table.main(["--networks", "A0,A1,A2,B0", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "table.json").read_text())
    assert [one["network"] for one in content["found"]] == ["RepVGG-A0", "RepVGG-A1"]
    assert capsys.readouterr().err.splitlines()[-1] == "2 of 4: RepVGG-A1 measured"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--networks", "A0", "--size", "100"], 2, "--size 100: give a multiple of 32"),
        (["--networks", "A9"], 2, "A9: unknown"),
        (["--networks", "A0", "--provider", "x"], 2, "provider 'x': unknown"),
    ],
)
def test_an_error_is_one_line_and_a_code(arguments, code, message, monkeypatch, capsys):
    monkeypatch.setattr(paper_table, "found_of_repvgg", lambda *_: pytest.fail("measured"))
    assert paper_table.main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_out_that_cannot_be_drawn_for_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(paper_table, "found_of_repvgg", lambda *_: pytest.fail("measured"))
    assert paper_table.main(["--networks", "A0", "--out", str(tmp_path / "out")]) == 4
    assert "pip install 'repvgg-exporter[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
