"""The exporter's side of ``benchmarks/int8.py``: the quantization of ``python -m exporter --trt int8``, by itself.

    python -m benchmarks.int8_exporter FLOAT32.onnx CALIBRATION.npz OUT.onnx [--form int8] [--effort default]

From the float32 file to the INT8 file. The export's other work (fusing the checkpoint, comparing what was written,
compiling it) is not measured, as nothing like it is on the other side.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from benchmarks.int8_worker import cost_of, print_cost, watched_dataset, worker_parser
from exporter.dataset import Dataset
from exporter.onnx_file import graph_from_file, write_onnx
from exporter.onnx_graph import Graph
from exporter.quantization.calibration import Settings, calibrated_from_graph
from exporter.quantization.form import FORMS, Bits
from exporter.quantization.layerwise import EFFORTS
from exporter.quantization.qdq import graph_from_quantized


def loaded_graph(path: pathlib.Path) -> Graph:
    """A float32 file with its weights in memory, as an export has them, and not mapped."""
    graph = graph_from_file(path)
    return Graph(graph.structure, {name: np.array(array) for name, array in graph.weights.items()})


def quantize(graph: Graph, images: Dataset, out: pathlib.Path, settings: Settings) -> None:
    """Writes the INT8 file of a float32 graph."""
    calibrated = calibrated_from_graph(graph, images, settings, lambda _what, _done, _total: None)
    write_onnx(graph_from_quantized(calibrated.quantized), out)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes one file and prints what that took."""
    forms = {form.name: form for form in FORMS}
    parser = worker_parser(__doc__)
    parser.add_argument("--form", choices=forms, default=FORMS[0].name)
    parser.add_argument("--effort", choices=EFFORTS, default=EFFORTS[0])
    arguments = parser.parse_args(argv)
    images = watched_dataset(arguments.calibration, arguments.float32)
    settings = Settings(forms[arguments.form], arguments.effort, Bits(weights=arguments.weight_bits))
    graph = loaded_graph(arguments.float32)
    print_cost(cost_of(lambda: quantize(graph, images, arguments.out, settings), images))


if __name__ == "__main__":
    main()
