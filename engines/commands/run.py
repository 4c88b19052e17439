"""``python -m engines run FILE IMAGE...``: what the network says of an image."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from engines.errors import InputRejected, UsageError, VerificationFailed

if TYPE_CHECKING:
    from engines.preprocessing import Preprocessing
    from engines.runner import Runner

NAME = "run"
HELP = "name the classes of images, with a file's own preprocessing"
SCHEMA = 1
ALLOW_UNVERIFIED_HELP = (
    "load an engine without a sidecar or with another SHA-256: a plan is native code, and deserializing one is running "
    "it, so only for a file that you made yourself"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("file", type=pathlib.Path, metavar="FILE", help="an engine or ONNX file of an export")
    parser.add_argument("images", type=pathlib.Path, nargs="+", metavar="IMAGE", help="image files of any size")
    parser.add_argument("--names", type=pathlib.Path, metavar="TXT", help="a file with the name of a class per line")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="how many classes to print (default: 5)")
    parser.add_argument("--provider", help="ONNX Runtime's, for an ONNX file: cpu (the default), cuda, tensorrt")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the GPU to run on (default: 0)")
    parser.add_argument("--allow-unverified", action="store_true", help=ALLOW_UNVERIFIED_HELP)
    parser.add_argument("--json", action="store_true", help="print the answers as JSON, and nothing else, on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Prints, for each image, the most probable classes.

    Raises:
        ReportedError: the file, an image or the names cannot be used, or the answer is no number.
    """
    from engines.runner import load

    if arguments.top < 1:
        raise UsageError(f"--top {arguments.top}: give a number of at least 1")
    file: pathlib.Path = arguments.file
    options = {"device": arguments.device, "allow_unverified": arguments.allow_unverified}
    with load(file, provider=arguments.provider, **options) as runner:
        preprocessing = _preprocessing(runner, file)
        names = None if arguments.names is None else _names(arguments.names)
        answers = []
        if not arguments.json:
            print(f"preprocessing: {preprocessing.line}")
        for image in arguments.images:
            answer = _answer(runner, preprocessing, image, names, arguments.top)
            answers.append({"image": str(image), "top": answer})
            if not arguments.json:
                print(f"{image}\n" + "\n".join(_line(entry) for entry in answer))
    if arguments.json:
        found = {"schema": SCHEMA, "file": str(file), "preprocessing": preprocessing.line, "images": answers}
        json.dump(found, sys.stdout, indent=2)
        print()
    return 0


def _preprocessing(runner: Runner, file: pathlib.Path) -> Preprocessing:
    from engines.kind import ONNX, kind_of_file
    from engines.preprocessing import preprocessing_from_manifest, preprocessing_from_metadata

    if len(runner.inputs) != 1 or len(runner.outputs) != 1 or len(runner.outputs[0].shape) != 2:
        raise InputRejected(f"{file}: not one image in and one row of classes out; only such a file can be run")
    if runner.manifest is not None:
        return preprocessing_from_manifest(runner.manifest, str(file))
    if kind_of_file(file) != ONNX:
        raise InputRejected(f"{file}: without its sidecar nothing says how images are prepared for it; put it beside")
    return preprocessing_from_metadata(runner.metadata, runner.inputs[0], str(file))


def _names(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputRejected(f"{path}: no names can be read here ({error}); give a text file in UTF-8") from error


def _answer(
    runner: Runner, preprocessing: Preprocessing, image: pathlib.Path, names: list[str] | None, top: int
) -> list[dict[str, Any]]:
    import numpy as np

    array = preprocessing.array_from_image(image)
    logits = runner.run({runner.inputs[0].name: array})[runner.outputs[0].name][0].astype(np.float64)
    if not np.isfinite(logits).all():
        raise VerificationFailed(f"{image}: the answer holds NaN or infinite values; verify the file")
    if names is not None and len(names) != len(logits):
        raise InputRejected(f"--names: {len(names)} lines for {len(logits)} classes; give one line for each, in order")
    powers = np.exp(logits - logits.max())
    probabilities = powers / powers.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [
        {
            "class": int(index),
            "name": None if names is None else names[index],
            "probability": float(probabilities[index]),
        }
        for index in order
    ]


def _line(entry: dict[str, Any]) -> str:
    name = "" if entry["name"] is None else f"  {entry['name']}"
    return f"  {entry['probability']:7.2%}  class {entry['class']}{name}"
