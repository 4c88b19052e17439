"""What a benchmark is asked for, and where each setting came from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from engines.arguments import LARGEST_BATCH
from engines.backends.onnx_runtime import check_provider
from engines.errors import UsageError
from engines.sizes import LARGEST_SIZE, Size, text_of_size

DEFAULT_BATCHES = (1, 8, 32)
DURATION, LARGEST_DURATION = 3.0, 3600.0
LARGEST_THREADS = 1024
MOST_DEVICES = 1024
NOT_SPINNING = "not between calls, so that files leave each other the processor"
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "CUDA_MODULE_LOADING")
"""Variables that change what is measured; those that are set are among the settings."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting with its ``source``: a flag, "default", "environment", a file, or whose choice it was."""

    name: str
    value: str
    source: str


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure; None is the default, and is then said to be.

    ``batches`` are images at once; ``provider`` and ``threads`` are ONNX Runtime's; ``size`` is for files that take
    images of any; ``duration`` is the seconds that each row is measured for, where its windows agree at once.
    """

    batches: tuple[int, ...] | None = None
    provider: str | None = None
    threads: int | None = None
    device: int = 0
    size: Size | None = None
    duration: float = DURATION


def check_options(options: Options) -> None:
    """Raises ``UsageError`` for what nothing could be measured with."""
    check_provider(options.provider)
    if options.batches is not None:
        if not options.batches or not all(1 <= batch <= LARGEST_BATCH for batch in options.batches):
            raise UsageError(f"--batch: give whole numbers from 1 to {LARGEST_BATCH}, with commas")
        if len(set(options.batches)) != len(options.batches):
            raise UsageError("--batch: a batch is given twice")
    if options.threads is not None and not 1 <= options.threads <= LARGEST_THREADS:
        raise UsageError(f"--threads {options.threads}: give a whole number from 1 to {LARGEST_THREADS}")
    if options.threads is not None and options.provider not in (None, "cpu"):
        raise UsageError(f"--threads is for ONNX Runtime on the CPU, and --provider is {options.provider}")
    if not 0 <= options.device < MOST_DEVICES:
        raise UsageError(f"--device {options.device}: GPUs are counted from 0, and none has this number")
    if not 0 < options.duration <= LARGEST_DURATION:
        raise UsageError(f"--duration {options.duration:g}: give seconds, above 0 and up to {LARGEST_DURATION:g}")
    if options.size is not None and not all(1 <= extent <= LARGEST_SIZE for extent in options.size):
        raise UsageError(f"--size {text_of_size(options.size)}: give N or HxW, from 1 to {LARGEST_SIZE}")


def settings_of(
    options: Options,
    batches: tuple[int, ...],
    sizes: Sequence[Size],
    *,
    with_onnx: bool,
    with_gpu: bool,
) -> tuple[Setting, ...]:
    """Everything that was set, chosen or left alone.

    Args:
        options: as asked for.
        batches: that were measured.
        sizes: of each file's images.
        with_onnx: ONNX files are among the files, so that ONNX Runtime's settings matter.
        with_gpu: something is computed on a GPU, so that it matters which.
    """
    found = [
        Setting("batch", ",".join(map(str, batches)), _source("--batch", is_default=options.batches is None)),
        Setting("duration", f"{options.duration:g} s", _source("--duration", is_default=options.duration == DURATION)),
    ]
    if with_gpu:
        found.append(Setting("device", str(options.device), _source("--device", is_default=options.device == 0)))
    several = ", ".join(dict.fromkeys(map(text_of_size, sizes)))
    found.append(Setting("size", several, "file, else golden.npz" if options.size is None else "--size"))
    if with_onnx:
        provider = check_provider(options.provider)
        found.append(Setting("provider", provider, _source("--provider", is_default=options.provider is None)))
        if options.threads is not None:
            found.append(Setting("threads", str(options.threads), "--threads"))
        elif provider == "cpu":
            found.append(Setting("threads", "its own choice", "ONNX Runtime"))
        if provider == "cpu":
            found.append(Setting("spinning threads", NOT_SPINNING, "bench"))
    found += [Setting(name, os.environ[name], "environment") for name in ENVIRONMENT if name in os.environ]
    return tuple(found)


def _source(flag: str, *, is_default: bool) -> str:
    return "default" if is_default else flag
