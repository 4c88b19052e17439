"""Every name, enum value and number of arguments that the engines use of NVIDIA's bindings, held to the real ones.

What is used is read off the source (``tests.contract.binding_uses``), what there is off the bindings themselves
(``tests.engines.sdk_bindings``): TensorRT 10 and 11, TensorRT for RTX, and the CUDA runtime of cuda-bindings.
"""

from __future__ import annotations

import pytest
from cuda.bindings import runtime as cuda_runtime

from engines.sdk import RTX_CARDS
from tests.conftest import ROOT
from tests.contract.binding_uses import Use, returned_type, uses_of
from tests.engines.sdk_bindings import FULL, RTX, VERSIONS, argument_counts, bindings_of, split

ENGINES = ROOT / "engines"
SDK_MODULES = (
    ENGINES / "compiler.py",
    ENGINES / "sdk.py",
    ENGINES / "runtime_cache.py",
    *sorted((ENGINES / "backends").glob("*.py")),
)
CUDA_MODULES = (ENGINES / "cuda.py", ENGINES / "bench" / "telemetry.py", *sorted((ENGINES / "backends").glob("*.py")))
SDK_VARIABLES = {"trt": "", "context": "IExecutionContext"}  # contexts are handed from function to function
CUDA_VARIABLES = {"runtime": "", "cuda": ""}
RTX_ALONE = {
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IExecutionContext.is_stream_capturable",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}
"""What the code asks for before it uses it, so that full TensorRT need not have it."""


def sdk_uses(source: str) -> list[Use]:
    """Return types are RTX's, which has every class that is used."""
    members = bindings_of(RTX).members
    return uses_of(source, SDK_VARIABLES, lambda name: returned_type(members.get(name, "")))


def sdk_faults(uses: list[Use], version: str) -> list[str]:
    bindings = bindings_of(version)
    faults = []
    for use in uses:
        if use.name not in bindings.members:
            faults.append(f"line {use.line}: {use.name} is not in {version}")
        elif use.arguments is not None:
            is_class = f"{use.name}.__init__" in bindings.members
            counts = bindings.counts(f"{use.name}.__init__" if is_class else use.name)
            if counts and not any(use.arguments in count for count in counts):
                faults.append(f"line {use.line}: {use.name} takes no {use.arguments} arguments in {version}")
    return faults


def sources(modules):
    return [(path, path.read_text(encoding="utf-8")) for path in modules]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", SDK_MODULES, ids=lambda path: path.name)
def test_the_bindings_have_what_the_code_uses(path, version):
    uses = sdk_uses(path.read_text(encoding="utf-8"))
    if version in FULL:
        uses = [use for use in uses if use.name not in RTX_ALONE]
    assert sdk_faults(uses, version) == []


def test_what_is_used_is_what_a_reader_of_the_source_finds():
    """A few of each kind that stand in the code, so that a reader of the source that sees nothing fails."""
    uses = {(use.name, use.arguments) for _, source in sources(SDK_MODULES) for use in sdk_uses(source)}
    assert {
        ("Runtime", 1),
        ("Runtime.deserialize_cuda_engine", 1),
        ("ICudaEngine.get_tensor_profile_shape", 2),
        ("ICudaEngine.num_io_tensors", None),
        ("ICudaEngine.device_memory_size_v2", None),
        ("ICudaEngine.create_execution_context", 1),
        ("IExecutionContext.set_input_shape", 2),
        ("IExecutionContext.set_tensor_address", 2),
        ("IExecutionContext.execute_async_v3", 1),
        ("IExecutionContext.set_device_memory", 2),
        ("IExecutionContext.is_stream_capturable", 1),
        ("IRuntimeConfig.set_runtime_cache", 1),
        ("IRuntimeCache.deserialize", 1),
        ("ILogger.log", 2),
        ("ILogger.Severity.INTERNAL_ERROR", None),
        ("TensorIOMode.INPUT", None),
        ("TensorLocation.DEVICE", None),
        ("ExecutionContextAllocationStrategy.USER_MANAGED", None),
        ("nptype", 1),
        ("Builder", 1),
        ("Builder.create_network", 1),
        ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", None),
        ("INetworkDefinition.num_inputs", None),
        ("IOptimizationProfile.set_shape", None),
        ("IProgressMonitor.phase_start", 3),
    } <= uses


@pytest.mark.parametrize("version", FULL)
def test_what_only_rtx_has_is_used_and_is_not_in_full_tensorrt(version):
    used = {use.name for _, source in sources(SDK_MODULES) for use in sdk_uses(source)}
    assert used >= RTX_ALONE
    assert not RTX_ALONE & set(bindings_of(version).members)
    assert set(bindings_of(RTX).members) >= RTX_ALONE


def test_every_card_of_rtx_is_one_of_its_targets():
    members = bindings_of(RTX).members
    assert all(f"ComputeCapability.SM{card}" in members for card in RTX_CARDS)
    assert "ComputeCapability.SM90" not in members


PLANTED = """
def f(calls, self, trt):
    self._deserializer = calls.answer(trt.Runtime, 1, 2)
    self._engine = calls.answer(self._deserializer.deserialize_cuda_engine, b"")
    self._engine.get_tensor_nam(0)
    calls.answer(self._engine.get_tensor_name)
    config = calls.answer(self._engine.create_runtime_config)
    config.strategy = calls.trt.ExecutionContextAllocationStrategy.MANAGED
    context = self._engine.create_execution_context(config)
    context.execute_async_v2(1)
    context.execute_async_v3(1, 2)
    context.set_input_shape("input", (1,))

class Logger(trt.ILogger):
    def log(self, severity): ...
"""


def test_planted_mistakes_are_found():
    names = [fault.partition(": ")[2].removesuffix(f" in {RTX}") for fault in sdk_faults(sdk_uses(PLANTED), RTX)]
    assert sorted(names) == [
        "ExecutionContextAllocationStrategy.MANAGED is not",
        "ICudaEngine.get_tensor_nam is not",
        "ICudaEngine.get_tensor_name takes no 0 arguments",
        "IExecutionContext.execute_async_v2 is not",
        "IExecutionContext.execute_async_v3 takes no 2 arguments",
        "ILogger.log takes no 1 arguments",
        "IRuntimeConfig.strategy is not",
        "Runtime takes no 2 arguments",
    ]


@pytest.mark.parametrize("version", FULL)
def test_what_full_tensorrt_removed_would_be_found(version):
    uses = sdk_uses(
        "def f(builder, trt):\n    builder = trt.Builder(1)\n    builder.platform_has_fast_int8\n    trt.Ghost\n"
    )
    faults = sdk_faults(uses, version)
    assert any("Ghost" in fault for fault in faults)
    assert any("platform_has_fast_int8" in fault for fault in faults) == (version == FULL[1])


def test_bindings_that_are_not_installed_fail_with_the_command_that_installs_them(monkeypatch, tmp_path):
    from tests.engines import sdk_bindings

    monkeypatch.setattr(sdk_bindings, "FOLDER", tmp_path)
    with pytest.raises(AssertionError, match="make setup installs them"):
        bindings_of.__wrapped__(FULL[0])


@pytest.mark.parametrize(
    ("docstring", "counts"),
    [
        ("f(self: a.B) -> None", [range(1)]),
        ("f(self: a.B, x: dict[int, str], y: C = <C.D: 0>) -> bool", [range(1, 3)]),
        (
            "f(*args, **kwargs)\nOverloaded\n\n1. f(self: B, x: int) -> int\n\n2. f(self: B) -> int\n",
            [range(1, 2), range(1)],
        ),
        ("no signature", []),
    ],
    ids=range(4),
)
def test_signatures_are_read_as_they_stand(docstring, counts):
    assert argument_counts(docstring, "f") == counts


def test_commas_in_brackets_separate_nothing():
    assert split("a: dict[str, int], b: tuple = (1, 2)") == ["a: dict[str, int]", "b: tuple = (1, 2)"]
    assert split("") == []


# --- the CUDA runtime


def cuda_uses(source):
    return [use for use in uses_of(source, CUDA_VARIABLES, lambda name: None) if use.name.startswith("cuda")]


def cuda_faults(uses):
    faults = []
    for use in uses:
        thing = cuda_runtime
        for part in use.name.split("."):
            thing = getattr(thing, part, None)
        if thing is None:
            faults.append(f"line {use.line}: {use.name} is not there")
        elif use.arguments is not None:
            stated = thing.__doc__.splitlines()[0]
            takes = len(split(stated[stated.index("(") + 1 : stated.rindex(")")]))
            if use.arguments != takes:
                faults.append(f"line {use.line}: {use.name} takes {takes} arguments, not {use.arguments}")
    return faults


@pytest.mark.parametrize("path", CUDA_MODULES, ids=lambda path: path.name)
def test_the_cuda_runtime_has_what_the_code_uses(path):
    assert cuda_faults(cuda_uses(path.read_text(encoding="utf-8"))) == []


def test_the_uses_of_the_cuda_runtime_are_found():
    uses = {(use.name, use.arguments) for _, source in sources(CUDA_MODULES) for use in cuda_uses(source)}
    assert {
        ("cudaMalloc", 1), ("cudaFree", 1), ("cudaMallocHost", 1), ("cudaFreeHost", 1), ("cudaMemcpyAsync", 5),
        ("cudaStreamCreateWithFlags", 1), ("cudaStreamSynchronize", 1), ("cudaStreamBeginCapture", 2),
        ("cudaStreamEndCapture", 1), ("cudaGraphInstantiate", 2), ("cudaGraphLaunch", 2), ("cudaGraphDestroy", 1),
        ("cudaEventCreateWithFlags", 1), ("cudaEventRecord", 2), ("cudaEventSynchronize", 1),
        ("cudaEventElapsedTime", 2), ("cudaEventDestroy", 1), ("cudaEventDefault", None),
        ("cudaEventDisableTiming", None), ("cudaDeviceGetPCIBusId", 2),
        ("cudaStreamWaitEvent", 3), ("cudaSetDevice", 1), ("cudaGetDevice", 0), ("cudaDeviceGetAttribute", 2),
        ("cudaMemcpyKind.cudaMemcpyHostToDevice", None), ("cudaError_t.cudaSuccess", None),
        ("cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor", None), ("cudaStreamNonBlocking", None),
    } <= uses  # fmt: skip


def test_planted_mistakes_with_the_cuda_runtime_are_found():
    planted = """
def f(runtime, self):
    checked(runtime, runtime.cudaMalloc)
    self._cuda.cudaFreeDevice(1)
    kind = runtime.cudaMemcpyKind
    kind.cudaMemcpyUpwards
    runtime.cudaFree(1)
"""
    assert cuda_faults(cuda_uses(planted)) == [
        "line 3: cudaMalloc takes 1 arguments, not 0",
        "line 4: cudaFreeDevice is not there",
        "line 6: cudaMemcpyKind.cudaMemcpyUpwards is not there",
    ]
