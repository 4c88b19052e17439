"""The benchmark's arithmetic and its memory sampler, and that both sides of it compute the same network."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from benchmarks import export_time, plain_export, random_checkpoint
from benchmarks.export_time import EXPORTER, PLAIN, Row, Run
from exporter import export
from exporter.variants import variant_from_name
from tests.conftest import run_process

TINY = ((1, 2, 2, 1, 1), (8, 8, 12, 16, 16))
CLASSES = 10
SIZE = 64


def run(seconds: float, own: float = 100.0, children: tuple[float, ...] = (), sampled: float = 0.0) -> Run:
    return Run(seconds, 2 * seconds, 0.25, own, children, own, sampled)


ROWS = [
    Row("A0", PLAIN, (run(4.0, 400), run(8.0, 500), run(5.0, 600, sampled=590.0))),
    Row("A0", EXPORTER, (run(3.0, 300, (20.0,), 310.0), run(2.0, 200, (250.0,), 420.0), run(2.5, 240, (), 200.0))),
    Row("", "python -m exporter --help", (run(0.1), run(0.3), run(0.2))),
]


def test_ratios_are_of_medians_and_of_each_round():
    ratios = export_time.ratios_from_rows(ROWS[1], ROWS[0])
    assert ratios.seconds == 0.5
    assert ratios.each_round == (0.75, 0.25, 0.5)
    assert ratios.peak == 0.5  # medians 250 and 500: the largest process, own or child


def test_sides_with_different_numbers_of_rounds_are_not_compared():
    with pytest.raises(ValueError, match="shorter"):
        export_time.ratios_from_rows(ROWS[1], Row("A0", PLAIN, ROWS[0].runs[:2]))


def test_the_table_shows_every_number_in_its_column():
    assert export_time.table_from_rows(ROWS).splitlines() == [
        "network  what                       median s  min-max s  ratio      each round  cpu s  others  peak MB  ratio"
        "  total MB",
        "A0       plain script                   5.00  4.00-8.00      -               -  10.00     0.2      500      -"
        "       500",
        "A0       exporter                       2.50  2.00-3.00   0.50  0.75 0.25 0.50   5.00     0.2      250   0.50"
        "       310",
        "-        python -m exporter --help      0.20  0.10-0.30      -               -   0.40     0.2        -      -"
        "         -",
    ]


def test_the_json_has_every_run_and_the_ratios():
    content = json.loads(export_time.json_from_rows(ROWS, "two cores"))
    assert content["machine"] == "two cores"
    plain, ours, startup = content["rows"]
    assert [found["seconds"] for found in ours["runs"]] == [3.0, 2.0, 2.5]
    assert [found["peak_mb"] for found in ours["runs"]] == [300, 250, 240]
    assert [found["total_mb"] for found in ours["runs"]] == [310, 420, 240]
    assert ours["ratios"] == {"seconds": 0.5, "each_round": [0.75, 0.25, 0.5], "peak": 0.5}
    assert plain["ratios"] is None
    assert (startup["network"], startup["ratios"]) == (None, None)


def test_the_sides_take_turns_and_the_warm_up_is_not_counted(capsys):
    order = []

    def side(name: str, seconds: list[float]):
        def once() -> Run:
            order.append(name)
            return run(seconds.pop(0))

        return once

    sides = {PLAIN: side("A", [99.0, 1.0, 2.0]), EXPORTER: side("B", [88.0, 3.0, 4.0])}
    plain, ours = export_time.interleaved("A0", sides, rounds=2)
    assert "".join(order) == "ABABAB"
    assert (plain.what, plain.seconds, ours.what, ours.seconds) == (PLAIN, [1.0, 2.0], EXPORTER, [3.0, 4.0])
    assert capsys.readouterr().out == ""


ALLOCATES = "x = b'x' * ({} << 20); import time; time.sleep({})"
STARTS_A_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}], check=True)"
MEASURES = """
import dataclasses, json, pathlib, sys
from benchmarks.export_time import measured
print(json.dumps(dataclasses.asdict(measured([sys.executable, "-c", sys.argv[1]], pathlib.Path(sys.argv[2])))))
"""


def measured_in_a_light_process(code: str, directory: pathlib.Path) -> Run:
    """A process starts with its parent's high-water mark, so that this one, which has torch, must not be the parent."""
    outcome = run_process(["-c", MEASURES, code, directory / "log"], directory)
    assert outcome.returncode == 0, outcome.stderr
    return Run(**json.loads(outcome.stdout))


@pytest.mark.parametrize("megabytes", [20, 200])
def test_the_memory_of_a_child_process_is_seen_and_told_from_its_parents(megabytes, tmp_path):
    code = STARTS_A_CHILD.format(ALLOCATES.format(megabytes, 0.4))
    found = measured_in_a_light_process(code, tmp_path)
    (child,) = found.children_mb
    assert megabytes <= child <= megabytes + 25
    assert 5 < found.own_mb < 40
    assert child + 5 < found.sampled_mb < child + 45
    assert 0.4 < found.seconds < 10


def test_memory_that_is_there_between_two_readings_counts_too(tmp_path):
    found = measured_in_a_light_process("x = b'x' * (150 << 20); del x", tmp_path)
    assert found.children_mb == []
    assert 150 <= max(found.own_mb, found.max_rss_mb) <= 175


def test_processor_time_is_that_of_the_command_and_not_of_the_others(tmp_path):
    spins = "import time\nwhile time.process_time() < {}: pass"
    other = subprocess.Popen([sys.executable, "-c", spins.format(60)])
    try:
        found = measured_in_a_light_process(spins.format(0.5), tmp_path)
    finally:
        other.kill()
        other.wait()
    assert 0.45 < found.cpu_seconds < 0.8
    assert found.other_cores > 0.3


def test_a_command_that_fails_ends_the_benchmark_with_its_last_line(tmp_path):
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no such thing')"]
    with pytest.raises(SystemExit, match=r"^error: .* ended with status 1: no such thing$"):
        export_time.measured(command, tmp_path / "log")


@pytest.mark.parametrize("left_out", [None, *export_time.MADE])
def test_an_export_that_writes_no_engine_or_graph_is_not_timed(left_out, tmp_path):
    out = tmp_path / "out"
    names = [f"model.{suffix}" for suffix in export_time.MADE if suffix != left_out]
    code = f"import pathlib; p = pathlib.Path({str(out)!r}); p.mkdir(); [(p / n).write_text('x') for n in {names}]"
    command = [sys.executable, "-c", code]
    if left_out is None:
        assert export_time.measured_export(command, out).seconds > 0
        assert not out.exists()
    else:
        with pytest.raises(SystemExit, match=f"wrote no {left_out}$"):
            export_time.measured_export(command, out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "A0,C7"], "unknown network 'C7'; choose from A0, B3"),
        (["--rounds", "0"], "'0' is not a whole number above 0"),
        (["--rounds", "-1"], "'-1' is not a whole number above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        export_time.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_plain_script_has_the_networks_that_are_measured_in_their_published_shapes():
    assert tuple(plain_export.NETWORKS) == export_time.NETWORKS
    for name, shape in plain_export.NETWORKS.items():
        variant = variant_from_name(name)
        assert shape == (variant.depths, variant.widths)


def tiny() -> plain_export.RepVGG:
    return random_checkpoint.random_repvgg(*TINY, CLASSES)


def relative_error(reference, candidate) -> float:
    reference, candidate = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    return float(np.abs(candidate - reference).max() / np.abs(reference).max())


def test_random_activations_stay_in_the_range_of_float16_through_the_depth():
    model = random_checkpoint.random_repvgg(*plain_export.NETWORKS["A0"])
    peaks = []
    for block in model.modules():
        if isinstance(block, plain_export.Block):
            block.register_forward_hook(lambda _block, _inputs, output: peaks.append(float(output.abs().max())))
    with torch.no_grad():
        scores = model(torch.randn(1, 3, plain_export.SIZE, plain_export.SIZE))
    assert len(peaks) == 22
    assert 0.5 < min(peaks) <= max(peaks) < 1000
    assert 0.1 < float(scores.std()) < 100


def test_no_random_batch_norm_is_the_identity():
    for module in tiny().modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor.std() > 0.01


@pytest.mark.parametrize(("eps", "same"), [(1e-5, True), (1e-3, False)])
def test_the_plain_scripts_fusion_is_its_own_network_in_float64(eps, same):
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = tiny().double()
    with torch.no_grad():
        reference = model(x)
        model.stage2[1].rbr_identity.eps = eps
        fused = plain_export.switch_to_deploy(model)
        error = relative_error(reference, fused(x))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert error < 1e-12 if same else error > 1e-6


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> dict[tuple[str, str], bytes]:
    """Both sides' graphs by side and precision, from one checkpoint."""
    directory = tmp_path_factory.mktemp("both")
    model = tiny()
    torch.save(model.state_dict(), directory / "tiny.pth")
    export(directory / "tiny.pth", directory / "ours", trt=("fp16",), sdk="tensorrt_rtx", size=SIZE)
    exported = plain_export.onnx_from_model(plain_export.switch_to_deploy(model), SIZE)
    found = {("plain", "fp32"): exported.SerializeToString()}
    found["plain", "fp16"] = plain_export.half_in_place(exported).SerializeToString()
    for precision, name in (("fp32", "tiny.onnx"), ("fp16", "tiny.fp16.onnx")):
        found["ours", precision] = (directory / "ours" / name).read_bytes()
    return found


def outputs(graph: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(["output"], {"input": images})[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("precision", "gate"), [("fp32", 5e-6), ("fp16", 5e-3)])
def test_both_sides_write_the_same_network(graphs, precision, gate, batch):
    images = np.random.default_rng(2).standard_normal((batch, 3, SIZE, SIZE), dtype=np.float32)
    reference = tiny().double()(torch.from_numpy(images).double()).detach()
    plain, ours = outputs(graphs["plain", precision], images), outputs(graphs["ours", precision], images)
    assert ours.shape == plain.shape == (batch, CLASSES)
    assert relative_error(ours, plain) < gate
    assert relative_error(reference, plain) < gate
    moved = np.roll(images, 1, axis=1)  # colour channels in another order: as near as a wrong network may come
    assert relative_error(outputs(graphs["ours", precision], moved), plain) > 10 * gate


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_sides_hand_the_compiler_the_same_work_in_float16(graphs):
    counts = {}
    for side in ("plain", "ours"):
        model = onnx.load_from_string(graphs[side, "fp16"])
        onnx.checker.check_model(model, full_check=True)
        operations = [node.op_type for node in model.graph.node]
        floating = [w.data_type for w in model.graph.initializer if w.data_type != onnx.TensorProto.INT64]
        assert set(floating) == {onnx.TensorProto.FLOAT16}
        counts[side] = (operations.count("Conv"), operations.count("Relu"), operations.count("Cast"), len(floating))
    assert counts["plain"] == counts["ours"] == (7, 7, 2, 16)
