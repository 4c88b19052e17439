"""ONNX files, by ONNX Runtime, on the provider that was asked for or not at all.

ONNX Runtime itself would rather answer from somewhere else: a provider that does not start is dropped with a line in
the log, nodes that it does not take go to the CPU, and a failed session is made again without it. All three are turned
off or looked for here.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from engines.backends.backend import Arrays, TensorDescription
from engines.errors import InputRejected, SdkMissing, UsageError, first_line

DEFAULT_PROVIDER = "cpu"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
ERRORS_ALONE = 3
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRuntime:
    """A session; see ``engines.backends.backend.Backend``. ``metadata`` are the file's ``metadata_props``."""

    def __init__(
        self,
        path: pathlib.Path,
        *,
        provider: str | None = None,
        device: int = 0,
        threads: int | None = None,
        spinning: bool = True,
    ) -> None:
        """Opens the file.

        Args:
            path: an ONNX file, with its external weights, if any, beside it.
            provider: of PROVIDERS; None is the CPU.
            device: the GPU, for a provider that has any.
            threads: that compute an operation on the CPU; None is ONNX Runtime's own choice.
            spinning: whether these threads go on waiting busily for a while after a call, as is usual. Of several
                sessions in turn, the idle ones then take the processor from the one that works.

        Raises:
            UsageError: there is no provider of that name.
            SdkMissing: ONNX Runtime or the provider is not on this machine, or the provider did not start.
            InputRejected: ONNX Runtime refuses the file.
        """
        name = _provider_name(provider)
        session = _session(path, name, device, threads, spinning=spinning)
        self._path, self._session = path, session
        self.inputs = tuple(_description(value, path) for value in session.get_inputs())
        self.outputs = tuple(_description(value, path) for value in session.get_outputs())
        self.batch = _batch(self.inputs, path)
        self.metadata: dict[str, str] = dict(session.get_modelmeta().custom_metadata_map)
        self._output_names = [description.name for description in self.outputs]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Computes one batch; the arrays returned are the caller's.

        Raises:
            InputRejected: the graph cannot be computed on these inputs.
        """
        try:
            outputs = self._session.run(self._output_names, feeds)
        except Exception as error:  # ONNX Runtime's own exceptions have no common type
            raise InputRejected(f"{self._path}: ONNX Runtime failed ({first_line(error)})") from error
        return dict(zip(self._output_names, outputs, strict=True))

    def close(self) -> None:
        """Frees the session."""
        self._session = None


def check_provider(provider: str | None) -> str:
    """The provider, or the default for None; raises ``UsageError`` unless it is one of PROVIDERS."""
    chosen = DEFAULT_PROVIDER if provider is None else provider
    if chosen not in PROVIDERS:
        raise UsageError(f"provider {chosen!r}: unknown; choose from {', '.join(PROVIDERS)}")
    return chosen


def _provider_name(provider: str | None) -> str:
    chosen = check_provider(provider)
    name = PROVIDERS[chosen]
    try:
        import onnxruntime
    except ImportError as error:
        raise SdkMissing(
            f"ONNX Runtime is not installed here, or does not start ({first_line(error)}); "
            f"pip install 'repvgg-exporter[ort]'"
        ) from error
    available = onnxruntime.get_available_providers()
    if name not in available:
        raise SdkMissing(
            f"provider {chosen}: this ONNX Runtime has {', '.join(available)}, no {name}; "
            f"pip install 'repvgg-exporter[ort-gpu]' in the place of onnxruntime"
        )
    return name


def _session(path: pathlib.Path, name: str, device: int, threads: int | None, *, spinning: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ALONE
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file's ending says
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    on_cpu = name == PROVIDERS["cpu"]
    if not on_cpu:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider = name if on_cpu else (name, {"device_id": str(device)})
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
    except Exception as error:
        if on_cpu:
            raise InputRejected(f"{path}: ONNX Runtime refuses it ({first_line(error)}); export it again") from error
        raise SdkMissing(f"{path}: {name} cannot compute it here ({first_line(error)})") from error
    if name not in session.get_providers():
        raise SdkMissing(
            f"{name}: ONNX Runtime could not start it and would use {', '.join(session.get_providers())}; "
            f"see its log for the library that it misses"
        )
    return session


def _description(value: Any, path: pathlib.Path) -> TensorDescription:
    dtype = DTYPES.get(value.type)
    if dtype is None:
        raise InputRejected(f"{path}: {value.name} is a {value.type}, which numpy has not; export it again")
    shape = tuple(extent if isinstance(extent, int) else None for extent in value.shape)
    return TensorDescription(value.name, dtype, shape)


def _batch(inputs: tuple[TensorDescription, ...], path: pathlib.Path) -> tuple[int, int | None]:
    """The batches that the graph takes: any, or exactly the one that its inputs fix."""
    firsts = {description.shape[0] if description.shape else 0 for description in inputs}
    if len(firsts) != 1 or 0 in firsts:
        raise InputRejected(f"{path}: its inputs have no batch in common as their first dimension; export it again")
    first = firsts.pop()
    return (1, None) if first is None else (first, first)
