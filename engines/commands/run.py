"""``python -m engines run FILE IMAGE...``: what the network says of an image.

A classifier names the most probable classes. Of feature maps there is nothing to name: their shapes are said, and their
smallest, mean and largest value; ``--save`` keeps the numbers themselves.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engines.errors import InputRejected, OutputFailed, UsageError, VerificationFailed
from engines.interrupts import Uninterrupted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from engines.preprocessing import Preprocessing
    from engines.runner import Runner

NAME = "run"
HELP = "name the classes of images, or show their feature maps, with a file's own preprocessing"
SCHEMA = 1
DEFAULT_TOP = 5
ALLOW_UNVERIFIED_HELP = (
    "load an engine without a sidecar or with another SHA-256: a plan is native code, and deserializing one is running "
    "it, so only for a file that you made yourself"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("file", type=pathlib.Path, metavar="FILE", help="an engine or ONNX file of an export")
    parser.add_argument("images", type=pathlib.Path, nargs="+", metavar="IMAGE", help="image files of any size")
    parser.add_argument("--names", type=pathlib.Path, metavar="TXT", help="a file with the name of a class per line")
    parser.add_argument("--top", type=int, metavar="K", help=f"how many classes to print (default: {DEFAULT_TOP})")
    parser.add_argument("--save", type=pathlib.Path, metavar="NPZ", help="write all outputs of all images, by name")
    parser.add_argument("--provider", help="ONNX Runtime's, for an ONNX file: cpu (the default), cuda, tensorrt")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the GPU to run on (default: 0)")
    parser.add_argument("--allow-unverified", action="store_true", help=ALLOW_UNVERIFIED_HELP)
    parser.add_argument("--json", action="store_true", help="print the answers as JSON, and nothing else, on stdout")


def run(arguments: argparse.Namespace, interrupts: Uninterrupted) -> int:
    """Prints, for each image, the most probable classes, or what its feature maps are like.

    Raises:
        ReportedError: the file, an image or the names cannot be used, or the answer is no number.
    """
    from engines.runner import load

    if arguments.top is not None and arguments.top < 1:
        raise UsageError(f"--top {arguments.top}: give a number of at least 1")
    file: pathlib.Path = arguments.file
    options = {"device": arguments.device, "allow_unverified": arguments.allow_unverified}
    with load(file, provider=arguments.provider, **options) as runner:
        preprocessing = _preprocessing(runner, file)
        ranked = len(runner.outputs) == 1 and len(runner.outputs[0].shape) == 2
        _check_options(arguments, ranked=ranked)
        names = None if arguments.names is None else _names(arguments.names)
        found: list[dict[str, Any]] = []
        kept: list[dict[str, NDArray[Any]]] = []
        if not arguments.json:
            print(f"preprocessing: {preprocessing.line}")
        for image in arguments.images:
            outputs = _outputs(runner, preprocessing, image)
            if ranked:
                (scores,) = outputs.values()
                top = _top(scores[0], names, arguments.top or DEFAULT_TOP)
                lines = [_class_line(entry) for entry in top]
                found.append({"image": str(image), "top": top})
            else:
                described = {name: _described(array) for name, array in outputs.items()}
                lines = _output_lines(described)
                found.append({"image": str(image), "outputs": described})
            if arguments.save is not None:
                kept.append(outputs)
            if not arguments.json:
                print("\n".join([str(image), *lines]))
    if arguments.save is not None:
        interrupts.too_late()
        _save(arguments.save, kept)
    if arguments.json:
        told = {"schema": SCHEMA, "file": str(file), "preprocessing": preprocessing.line, "images": found}
        json.dump(told, sys.stdout, indent=2)
        print()
    return 0


def _check_options(arguments: argparse.Namespace, *, ranked: bool) -> None:
    for option in ("names", "top"):
        if getattr(arguments, option) is not None and not ranked:
            raise UsageError(f"--{option}: {arguments.file} has feature maps, which have no classes; leave it out")


def _preprocessing(runner: Runner, file: pathlib.Path) -> Preprocessing:
    from engines.kind import ONNX, kind_of_file
    from engines.preprocessing import preprocessing_from_manifest, preprocessing_from_metadata

    if len(runner.inputs) != 1 or not all(len(output.shape) in (2, 4) for output in runner.outputs):
        raise InputRejected(
            f"{file}: not one image in, and scores or feature maps out; only such a file can be run on images"
        )
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


def _outputs(runner: Runner, preprocessing: Preprocessing, image: pathlib.Path) -> dict[str, NDArray[Any]]:
    """Every output (1, ...) for one image file, by name."""
    import numpy as np

    outputs = runner.run({runner.inputs[0].name: preprocessing.array_from_image(image)})
    for array in outputs.values():
        if not np.isfinite(array).all():
            raise VerificationFailed(f"{image}: the answer holds NaN or infinite values; verify the file")
    return outputs


def _top(scores: NDArray[np.float32], names: list[str] | None, top: int) -> list[dict[str, Any]]:
    import numpy as np

    logits = scores.astype(np.float64)
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


def _class_line(entry: Mapping[str, Any]) -> str:
    name = "" if entry["name"] is None else f"  {entry['name']}"
    return f"  {entry['probability']:7.2%}  class {entry['class']}{name}"


def _described(array: NDArray[Any]) -> dict[str, Any]:
    """Of an output (1, ...): its shape without the batch, and what its values are like."""
    return {
        "shape": list(array.shape[1:]),
        "min": float(array.min()),
        "mean": float(array.mean(dtype="float64")),
        "max": float(array.max()),
    }


def _output_lines(described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    width = max(len(name) for name in described)
    return [
        f"  {name:<{width}}  {'x'.join(map(str, output['shape']))}  "
        f"min {output['min']:.6g}, mean {output['mean']:.6g}, max {output['max']:.6g}"
        for name, output in described.items()
    ]


def _save(path: pathlib.Path, kept: list[dict[str, NDArray[Any]]]) -> None:
    """Writes the outputs (images, ...) in the order of the images.

    Raises:
        OutputFailed: the file cannot be written.
    """
    import numpy as np

    from engines.files import write_whole

    arrays: dict[str, Any] = {name: np.concatenate([outputs[name] for outputs in kept]) for name in kept[0]}
    content = io.BytesIO()
    np.savez(content, **arrays)
    try:
        write_whole(path, content.getvalue())
    except OutputFailed as error:
        raise OutputFailed(str(error).replace("--out", "--save")) from error
