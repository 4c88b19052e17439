"""What ``make receipt`` runs on a machine with an NVIDIA GPU: exports for the card that is there, then their receipt.

    python examples/receipts/make_receipt.py --check          is there a GPU, and which SDK does its card need?
    python examples/receipts/make_receipt.py --out FILE       exports, runs, measures, and writes the receipt

While it exports, the GPU is hidden: the exporter checks engines on a GPU that it sees, and keeps nothing of an export
that fails, whereas a receipt is wanted above all of what fails. For a card that TensorRT for RTX does not know, the
engines are then built again, on the card, by full TensorRT.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys

from engines.commands.receipt import check_out
from engines.errors import INTERRUPTED_EXIT_CODE, OutputFailed, ReportedError, SdkMissing
from engines.sdk import RTX_CARDS, TURING, gpu_compute_capability

SHIPPED, CALIBRATION = "examples/fashion.pt", "examples/fashion_calibration.npz"
FOLDER = pathlib.Path("receipt-exports")
WHERE = "open a pull request that adds it to examples/receipts/, or attach it to an issue of this project"
VERIFICATION_FAILED = 1


@dataclasses.dataclass(frozen=True)
class Step:
    """A command of this Python's; ``sees_gpu`` is False where the GPU is hidden from it."""

    arguments: tuple[str, ...]
    sees_gpu: bool = True

    @property
    def line(self) -> str:
        """As it could be typed."""
        return shlex.join(("python", "-m", *self.arguments))


def card_here() -> int:
    """The first GPU's compute capability.

    Raises:
        SdkMissing: no GPU answers.
    """
    capability = gpu_compute_capability()
    if capability is None:
        raise SdkMissing(
            "no NVIDIA GPU answers here, and a receipt is of what one computes; run make receipt on a machine with a "
            "GPU and its driver, see nvidia-smi"
        )
    return capability


def sdk_of_card(capability: int) -> str:
    """The extra of this project, and so the SDK, that runs on the card: "rtx" or "tensorrt"."""
    return "rtx" if capability in RTX_CARDS else "tensorrt"


def precisions_of_card(capability: int) -> tuple[str, ...]:
    """What engines can be built in; TensorRT for RTX has but half precision for Turing."""
    return ("fp16",) if capability == TURING else ("fp32", "fp16", "int8")


def steps(capability: int, folder: pathlib.Path, out: pathlib.Path) -> list[Step]:
    """Everything there is to run, in order.

    Args:
        capability: of the card, as in 86.
        folder: where the exports go.
        out: the receipt.
    """
    fashion, network = folder / "fashion", folder / "repvgg_a0"
    checkpoint = network.with_suffix(".pt")
    precisions = precisions_of_card(capability)
    floating = tuple(name for name in precisions if name != "int8")
    on_rtx = sdk_of_card(capability) == "rtx"
    target = ("--sdk", "tensorrt_rtx", *(("--gpu", f"sm{capability}") if on_rtx else ()))
    images = ("--size", "28", "--calib", CALIBRATION)
    of_fashion = ("exporter", SHIPPED, "--out", str(fashion), "--trt", ",".join(precisions), *images, *target)
    of_network = ("exporter", str(checkpoint), "--out", str(network), "--trt", ",".join(floating), "--size", "224")
    made = [
        Step(of_fashion, sees_gpu=False),
        Step(("benchmarks.random_checkpoint", "A0", str(checkpoint)), sees_gpu=False),
        Step((*of_network, *target), sees_gpu=False),
    ]
    if not on_rtx:
        graphs = [fashion / f"fashion.{name}.onnx" for name in precisions]
        graphs += [network / f"repvgg_a0.{name}.onnx" for name in floating]
        made += [Step(("engines", "build", str(graph), "--sdk", "tensorrt")) for graph in graphs]
    return [*made, Step(("engines", "receipt", str(fashion), str(network), "--out", str(out)))]


def run(step: Step) -> int:
    """Runs a step with its output on this terminal; returns its exit code."""
    environment = dict(os.environ) if step.sees_gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", *step.arguments], env=environment, check=False).returncode


def receipt(out: pathlib.Path) -> int:
    """Runs all steps up to the first that fails, and says where the receipt goes; returns the exit code.

    Raises:
        SdkMissing: no GPU answers.
        OutputFailed: the receipt or the exports cannot be written.
    """
    made = steps(card_here(), FOLDER, out)
    check_out(out)
    try:
        FOLDER.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputFailed(f"{FOLDER}: cannot be made ({error.strerror}); exports need a directory here") from error
    for step in made:
        print(step.line, flush=True)
        code = run(step)
        if code != 0:
            break
    if step is made[-1] and code in (0, VERIFICATION_FAILED):
        found = "" if code == 0 else ", above all since something failed"
        print(f"{out} is written: please send it{found}: {WHERE}")
    return code


def main(arguments: list[str]) -> int:
    """The command line; an error is one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="print the extra of this project that the card needs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("receipt.json"), metavar="FILE")
    given = parser.parse_args(arguments)
    try:
        if given.check:
            print(sdk_of_card(card_here()))
            return 0
        return receipt(given.out)
    except ReportedError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE  # the step that was interrupted has said so


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
