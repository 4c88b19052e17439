"""An engine between PyCUDA arrays: images that lie on the GPU go in, scores come out there, and nothing is copied.

    pip install 'repvgg-exporter[rtx,pycuda]'
    python examples/serve_pycuda.py fashion/fashion.fp16.engine

PyCUDA has to work in the device's primary context, where TensorRT and the CUDA runtime are: ``pycuda.autoprimaryctx``
or ``retain_primary_context``. ``pycuda.autoinit`` makes a context of its own, whose addresses an engine cannot use.

No GPU has run this yet: it is tested against stand-ins that have the names and signatures of the real libraries.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray
from pycuda import driver, gpuarray

import engines


def scores(engine: str, images: NDArray[np.float32], device: int = 0) -> NDArray[np.float32]:
    """Runs one batch on the GPU.

    Args:
        engine: an engine file, with its sidecar beside it.
        images: (batch, channels, height, width), normalised; the batch within the engine's profile.
        device: index of the GPU.

    Returns:
        The first output, (batch, classes).
    """
    driver.init()
    context = driver.Device(device).retain_primary_context()
    context.push()
    try:
        with engines.load(engine, device=device) as runner:
            given = {runner.inputs[0].name: gpuarray.to_gpu(images)}
            found = {
                output.name: gpuarray.empty((len(images), *output.shape[1:]), np.dtype(output.dtype))
                for output in runner.outputs
            }
            stream = driver.Stream()
            runner.enqueue(given, found, stream)
            # More of your own work can follow here, on the same stream: kernels that read what the engine writes.
            stream.synchronize()
            answer: NDArray[np.float32] = found[runner.outputs[0].name].get()
            return answer
    finally:
        context.pop()


def main(engine: str) -> None:
    """Prints the class of each of a batch of noise, as large as the engine likes best."""
    with engines.load(engine) as runner:
        smallest, _ = runner.batch
        shape = (smallest, *(extent or 1 for extent in runner.inputs[0].shape[1:]))
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    print(scores(engine, images).argmax(axis=1))


if __name__ == "__main__":
    main(sys.argv[1])
