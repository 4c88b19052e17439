"""Whether a file computes what was simulated, step by step from the same values.

Two correct computations of a deep INT8 network differ at its end. Sums in another order differ by 1e-7; a value that
lies that near to halfway between two codes falls to the other side; and what a code changes behind it is far larger
than what changed the code. After some layers the two differ by as much as INT8 differs from float32. So each step is
given the very values that the file's own step was given, and must give what that gave.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.onnx_graph import Graph
from exporter.onnxruntime_cpu import session_from_layers
from exporter.quantization.layerwise import sqnr_db
from exporter.quantization.quantized import Quantized
from exporter.quantization.simulation import Simulation


def least_agreement(quantized: Quantized, written: Graph, images: NDArray[np.float32]) -> tuple[float, str]:
    """The SQNR in dB of the step whose simulation is farthest from what ONNX Runtime makes of it, and its name.

    Args:
        quantized: what is simulated.
        written: the graph in the file, which ONNX Runtime computes as it stands.
        images: (n, C, H, W).

    Raises:
        VerificationFailed: ONNX Runtime refuses the graph.
    """
    simulation = Simulation(quantized)
    names = list(dict.fromkeys(name for step in simulation.steps for name in (*step.inputs, step.output)))
    names.remove(simulation.image)
    found = session_from_layers(written, names).tensors(images, names)
    values = {name: torch.from_numpy(value).float() for name, value in zip(names, found, strict=True)}
    values[simulation.image] = torch.from_numpy(images)
    agreement = {}
    for step in simulation.steps:
        given = [values[name].clone() for name in step.inputs]
        agreement[step.name] = sqnr_db(values[step.output], simulation.computed(step, given))
    worst = min(agreement, key=agreement.__getitem__)
    return agreement[worst], worst
