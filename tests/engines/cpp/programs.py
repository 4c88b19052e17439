"""How the C++ programs are compiled over the stub, and engine files that the stub understands."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import struct
import subprocess

import numpy as np

from engines.golden_file import GoldenFile
from engines.manifest import Manifest, sidecar_path
from engines.parity import GATES
from tests.conftest import ROOT

CPP = ROOT / "engines" / "cpp"
STUB = pathlib.Path(__file__).parent
INCLUDES = (f"-I{STUB / 'interface'}", f"-I{STUB}", f"-I{CPP}")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wsign-conversion", "-Wshadow", "-Werror")
LIBRARY = (CPP / "repvgg_engine.cpp", STUB / "stub.cpp")
BENCH, PROBE = CPP / "repvgg_bench.cpp", STUB / "probe.cpp"
LANGUAGE = ("-std=c++17", "-O0", "-g1", *WARNINGS)
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=null,vptr,object-size")
"""Without what the sanitizer of addresses sees as well; it would double the time that compiling takes."""
THREAD = ("-fsanitize=thread", "-DSTUB_FULL_TENSORRT")
"""Full TensorRT in place of TensorRT for RTX, so that both are compiled and run."""

CHANNELS, SIZE, CLASSES = 3, 4, 5
BATCH = (2, 3, 4)
VERSIONS = {"tensorrt_rtx": "1.7.1.116", "tensorrt": "10.13.3.9"}
TAGS = {"tensorrt_rtx": b"vtrt", "tensorrt": b"ftrt"}
CARDS = (80, 86, 89, 120, 121)
MASK = 0x7E
FACTOR, TERM = 0.5, 0.25
WEIGHTS = np.random.default_rng(5).normal(size=(CLASSES, CHANNELS)).astype(np.float32)
IMAGES = np.random.default_rng(6).normal(size=(4, CHANNELS, SIZE, SIZE)).astype(np.float32)


def run(*command: object, cwd: pathlib.Path | None = None, **environment: object) -> subprocess.CompletedProcess[str]:
    """Runs a program; what stands in ``environment`` is added to this one's."""
    strings = [str(part) for part in command]
    settings = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(strings, cwd=cwd, env=settings, capture_output=True, text=True, check=False)


def check(*command: object, **environment: object) -> None:
    """Runs a program that must succeed, and say nothing of errors or warnings."""
    done = run(*command, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


def assert_refused_in_a_line_or_right(done: subprocess.CompletedProcess[str]) -> None:
    """A program in which a call failed said so in one line, or went on without what it did not need."""
    code = 3 if "cudaMallocHost" in done.stderr else 4  # memory that is pinned is the host's
    refused = done.returncode == code and re.fullmatch("error: [^\n]{20,}\n", done.stderr)
    assert refused or (done.returncode, done.stderr) == (0, ""), done.stderr


def build(folder: pathlib.Path, flags: tuple[str, ...]) -> None:
    """Compiles repvgg_bench and the probe into ``folder``, with every warning an error."""

    def object_from(source: pathlib.Path) -> None:
        check("g++", *LANGUAGE, *flags, *INCLUDES, "-c", source, "-o", folder / f"{source.stem}.o")

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(object_from, (*LIBRARY, BENCH, PROBE)))
    objects = [folder / f"{source.stem}.o" for source in LIBRARY]
    for program in (BENCH, PROBE):
        check("g++", *flags, folder / f"{program.stem}.o", *objects, "-o", folder / program.stem, "-pthread")


def build_with_cmake(folder: pathlib.Path, flags: tuple[str, ...]) -> None:
    """Builds and installs the library and its programs into ``folder / "prefix"``, and the probe with what is there."""
    build, prefix = folder / "build", folder / "prefix"
    settings = (f"-DREPVGG_ENGINE_STUB={STUB}", f"-DCMAKE_CXX_FLAGS={' '.join((*LANGUAGE[1:], *flags))}")
    check("cmake", "-S", CPP, "-B", build, *settings, TENSORRT_ROOT="")
    check("cmake", "--build", build, "-j", "2")
    check("cmake", "--install", build, "--prefix", prefix)
    library = (
        f"-I{prefix / 'include'}",
        f"-I{STUB}",
        f"-I{STUB / 'interface'}",
        PROBE,
        prefix / "lib/librepvgg_engine.a",
    )
    check("g++", *LANGUAGE, *flags, *library, "-o", prefix / "bin" / "probe", "-pthread")


@dataclasses.dataclass(frozen=True)
class Network:
    """What the stub's engine computes; ``lines`` are further ones of its text, as ``tests/engines/cpp/stub.cpp`` says.

    ``free`` lets it take images of 3x2 to 8x8 pixels. ``features`` adds an output of the input's shape.
    """

    batch: tuple[int, int, int] = BATCH
    free: bool = False
    features: bool = False
    weights: np.ndarray = dataclasses.field(default_factory=lambda: WEIGHTS)
    lines: tuple[str, ...] = ()

    @property
    def profile(self) -> tuple[tuple[int, ...], ...]:
        sizes = ((3, 2), (SIZE, SIZE), (8, 8)) if self.free else ((SIZE, SIZE),) * 3
        return tuple((rows, CHANNELS, *size) for rows, size in zip(self.batch, sizes, strict=True))

    @property
    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        size = ("features_height", "features_width") if self.free else (SIZE, SIZE)
        return {"output": ("N", CLASSES), **({"features": ("N", CHANNELS, *size)} if self.features else {})}

    def text(self) -> bytes:
        size = (-1, -1) if self.free else (SIZE, SIZE)
        numbers = " ".join(repr(float(weight)) for weight in self.weights.ravel())
        lines = [
            "stub 1",
            "activations 4096",
            "nanoseconds 500000",
            f"input input 4 -1 {CHANNELS} {size[0]} {size[1]}",
            "profile " + " ".join(map(str, itertools.chain(*self.profile))),
            f"linear output {CLASSES} {numbers}",
            *([f"affine features {FACTOR} {TERM}"] if self.features else []),
            *self.lines,
        ]
        return "\n".join(lines).encode() + b"\n"

    def answers(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """In float64, with the weights that it should have."""
        exact = images.astype(np.float64)
        outputs = {"output": exact.mean(axis=(2, 3)) @ WEIGHTS.astype(np.float64).T}
        return outputs | ({"features": FACTOR * exact + TERM} if self.features else {})


def engine_content(network: Network, sdk: str = "tensorrt_rtx", mask: int = MASK) -> bytes:
    """An engine file with a header as the real one's."""
    text = network.text()
    parts = [int(part) for part in VERSIONS[sdk].split(".")]
    header = struct.pack("<4s4xQQ4B4sI", TAGS[sdk], 2, 64 + len(text), *parts, TAGS[sdk], mask)
    return header.ljust(64, b"\0") + text


def manifest_of(network: Network, content: bytes, name: str, sdk: str = "tensorrt_rtx") -> Manifest:
    """What its sidecar says."""
    size = ("height", "width") if network.free else (SIZE, SIZE)
    sizes = ":".join(f"{height}x{width}" for _, _, height, width in network.profile)
    return Manifest(
        name=name,
        precision="fp16",
        sha256={"checkpoint": "0" * 64, "onnx": "1" * 64, "engine": hashlib.sha256(content).hexdigest()},
        sdk={"name": sdk, "version": VERSIONS[sdk]},
        compute_capabilities=CARDS,
        inputs=({"name": "input", "dtype": "float32", "shape": ["N", CHANNELS, *size]},),
        outputs=tuple(
            {"name": output, "dtype": "float32", "shape": list(shape)} for output, shape in network.outputs.items()
        ),
        profile={"input": network.profile},
        preprocessing={"mean": [0.5] * 3, "std": [0.25] * 3, "size": [SIZE, SIZE], "channels": CHANNELS},
        assumptions={
            "mean": "0.5,0.5,0.5",
            "std": "0.25,0.25,0.25",
            "size": sizes if network.free else f"{SIZE}x{SIZE}",
        },
        tolerance=5e-3,
        audit={"audited": False, "line": "not audited", "problems": []},
        golden="golden.npz",
    )


def write_engine(
    folder: pathlib.Path,
    network: Network | None = None,
    *,
    sdk: str = "tensorrt_rtx",
    name: str = "small.fp16.engine",
    mask: int = MASK,
    **changes: object,
) -> pathlib.Path:
    """An engine with its sidecar, in which ``changes`` replace what it would say."""
    network = network or Network()
    content = engine_content(network, sdk, mask)
    path = folder / name
    path.write_bytes(content)
    manifest = dataclasses.replace(manifest_of(network, content, name, sdk), **changes)
    sidecar_path(path).write_text(manifest.to_json())
    return path


def golden_file(network: Network | None = None, images: np.ndarray = IMAGES) -> GoldenFile:
    """The golden vectors of the network as it should be."""
    answers = (network or Network()).answers(images)
    return GoldenFile(images, {name: array.astype(np.float32) for name, array in answers.items()}, GATES)
