"""INT8 of the exporter against ONNX Runtime's own: what each costs a network's answers, in seconds and in memory.

    python benchmarks/int8.py [--json FILE] [--parts figures,timing] [--rounds 3]
    python benchmarks/int8.py --checkpoint model.pt --calib calib.npz --labels test.npz --size 224 [--strides ...] ...

Figures. A trained network, and its twin of the same function whose channels were multiplied by exp(N(0,1)), which is
what makes RepVGGs hard to quantize (``benchmarks/rescaled_checkpoint.py``). Without options it is the Fashion-MNIST
network in ``examples/``. Both sides start from the float32 ONNX file that ``python -m exporter CHECKPOINT --onnx``
writes, and see the same calibration images, which is checked:

    onnxruntime   quantize_static behind quant_pre_process: QDQ, signed, symmetric, with each of its calibrations
    exporter      --int8-effort default and high
    forms         int8: a weight scale for each channel. int8.rtx: one for each convolution, float16 elsewhere; the
                  other side's per-tensor weights stand beside it, in float32
    W4A8          weights of 4 bits as a stress of the algorithm; the other side rounds them to nearest

What a file is worth is computed by ONNX Runtime without optimizations on labelled images that are not among the
calibration images: ``benchmarks/int8_figures.py``. ``gain`` is the SQNR less that of onnxruntime's best calibration,
``ratio`` what something of the exporter's is divided by that calibration's.

Timing. RepVGG-A0 with random weights and 512 made-up images at 224 px: the exporter's default effort against MinMax,
the fastest calibration of the other side, in turns after an unmeasured one; the ratio is that of the medians. Then the
peak memory with 128 and with 1,024 images, and that of Percentile, which keeps every activation, with 32 and 64.

    s, cpu s   wall and processor time from float32 file to INT8 file, behind the side's own imports
    peak MB    VmHWM of a process that does nothing else; ``above`` is without what it held with the float32 file
               loaded, before it began

Not measured: the speed and the answers of engines on a GPU, and ImageNet. There is no pass or fail.

NVIDIA ModelOpt 0.47 is no dependency. Measured once, its ONNX INT8 with 512 calibration and 2,000 other images, max
and entropy calibration, per channel, scored as above:

    Fashion-MNIST network            31.4 and 23.3 dB; top-1 0.1 and 0.3 points lower
    its twin                          0.8 and 10.7 dB; 23.8 and 4.4 points lower
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

import exporter.cli
from benchmarks import rescaled_checkpoint
from benchmarks.export_time import rounds_from_text
from benchmarks.int8_figures import Figures, figures_from_logits, logits_of_file
from benchmarks.int8_onnxruntime import METHODS
from benchmarks.int8_table import OURS, THEIRS, Row, figures_table, json_of_results, machine_line, timing_table
from benchmarks.int8_timing import timing_rows
from benchmarks.int8_worker import ROOT, Cost, check_same_images, cost_of_worker, dataset_of

EXAMPLES = ROOT / "examples"
PARTS = ("figures", "timing")
FORMS = ("int8", "int8.rtx")
EFFORTS = ("default", "high")


@dataclasses.dataclass(frozen=True)
class Network:
    """A float32 ONNX file of the exporter, and the ``.npz`` files that it is quantized with and judged on."""

    name: str
    float32: pathlib.Path
    calibration: pathlib.Path
    labelled: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Case:
    """One file to make: the arguments of the side's worker."""

    form: str
    bits: int
    side: str
    what: str

    def arguments(self) -> list[str]:
        """For ``benchmarks.int8_onnxruntime`` or ``benchmarks.int8_exporter``."""
        found = ["--weight-bits", str(self.bits)]
        if self.side == OURS:
            return [*found, "--form", self.form, "--effort", self.what]
        return [*found, "--method", self.what, *(["--per-tensor"] if self.form == "int8.rtx" else [])]


def cases(*, stress: bool) -> Iterator[Case]:
    """Both forms by both sides; ``stress`` adds weights of 4 bits in the first form."""
    for form, bits in [*((form, 8) for form in FORMS), *([(FORMS[0], 4)] if stress else [])]:
        yield from (Case(form, bits, THEIRS, method) for method in METHODS)
        yield from (Case(form, bits, OURS, effort) for effort in EFFORTS)


def rows_of_network(network: Network, directory: pathlib.Path, *, stress: bool) -> list[Row]:
    """Quantizes with both sides and scores every file.

    Raises:
        SystemExit: a side fails, or they did not see the same images.
    """
    judged = dataset_of(network.labelled, network.float32)
    calibration = dataset_of(network.calibration, network.float32)
    if np.isin(judged.fingerprints(), calibration.fingerprints()).any():
        raise SystemExit(f"error: {network.labelled} holds images of {network.calibration}; judge on other ones")
    float32 = logits_of_file(network.float32, judged)
    labels = judged.labels(float32.shape[1])
    rows = []
    for case in cases(stress=stress):
        out = directory / "quantized.onnx"
        worker = f"benchmarks.int8_{case.side}"
        cost = cost_of_worker(worker, [network.float32, network.calibration, out, *case.arguments()])
        figures = figures_from_logits(logits_of_file(out, judged), float32, labels)
        rows.append(Row(network.name, case.form, case.bits, case.side, case.what, figures, cost))
        report_progress(rows[-1], figures, cost)
    check_same_images([row.cost for row in rows])
    return rows


def report_progress(row: Row, figures: Figures, cost: Cost) -> None:
    """A line on stderr for each file made."""
    what = f"{row.network}, {row.form}, W{row.bits}A8, {row.side} {row.what}"
    print(f"{what}: {figures.sqnr_db:.1f} dB, {cost.seconds:.1f} s", file=sys.stderr, flush=True)


def exported(checkpoint: pathlib.Path, out: pathlib.Path, flags: Sequence[str]) -> pathlib.Path:
    """The float32 ONNX file of a checkpoint.

    Raises:
        SystemExit: the exporter refuses it, and has said why.
    """
    code = exporter.cli.main([str(checkpoint), "--onnx", "--out", str(out), "--quiet", *flags])
    if code:
        raise SystemExit(code)
    return out / f"{checkpoint.stem}.onnx"


def networks_from_arguments(arguments: argparse.Namespace, directory: pathlib.Path) -> list[Network]:
    """The network as it was trained, and its twin."""
    flags = ["--size", arguments.size]
    for name in ("strides", "mean", "std"):
        if getattr(arguments, name) is not None:
            flags += [f"--{name}", getattr(arguments, name)]
    checkpoint, twin = arguments.checkpoint.resolve(), directory / "twin.pt"
    rescaled_checkpoint.main([str(checkpoint), str(twin), "--sigma", str(arguments.sigma)])
    data = arguments.calib.resolve(), arguments.labels.resolve()
    made = [("trained", checkpoint), ("rescaled", twin)]
    return [Network(name, exported(path, directory / name, flags), *data) for name, path in made]


def parts_from_text(text: str) -> tuple[str, ...]:
    """``"figures,timing"`` to its words."""
    parts = tuple(word.strip() for word in text.split(","))
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {part!r}; choose from {', '.join(PARTS)}")
    return parts


def argument_parser() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, default=EXAMPLES / "fashion.pt", help="official names")
    parser.add_argument("--calib", type=pathlib.Path, default=EXAMPLES / "fashion_calibration.npz")
    parser.add_argument("--labels", type=pathlib.Path, default=EXAMPLES / "fashion_test.npz")
    parser.add_argument("--size", default="28", help="as for the exporter, and so are --strides, --mean and --std")
    for name in ("strides", "mean", "std"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the twin's factors (1)")
    parser.add_argument("--parts", type=parts_from_text, default=PARTS, metavar=",".join(PARTS))
    parser.add_argument("--rounds", type=rounds_from_text, default=3, metavar="N", help="measured runs of the timing")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every number")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    arguments = argument_parser().parse_args(argv)
    machine, figures, timing = machine_line(), list[Row](), []
    with tempfile.TemporaryDirectory(prefix="int8-") as name:
        directory = pathlib.Path(name)
        if "figures" in arguments.parts:
            for network in networks_from_arguments(arguments, directory):
                figures += rows_of_network(network, directory, stress=network.name == "trained")
            print(figures_table(figures) + "\n")
        if "timing" in arguments.parts:
            timing = timing_rows(directory, arguments.rounds)
            print(timing_table(timing) + "\n")
    print(machine)
    if arguments.json is not None:
        arguments.json.write_text(json_of_results(machine, figures, timing), encoding="utf-8")


if __name__ == "__main__":
    main()
