"""Building engines: the real compiler end to end, every way that it can fail, and the processes around it."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import onnx
import pytest
from onnx import TensorProto, helper

from engines import compiler
from engines.build import build, check_options
from engines.compilation import CompilerProcess
from engines.compiler import Options, Request, engine_from_onnx
from engines.delivery import Build
from engines.errors import (
    CompilerRefused,
    InputRejected,
    OutputFailed,
    ReportedError,
    SdkMissing,
    UsageError,
    VerificationFailed,
)
from engines.files import sha256_of
from engines.integrity import checked_engine
from engines.plan import header_from_file, plan_from_file
from engines.sdk import SDKS, Sdk
from tests.conftest import ROOT, run_process
from tests.networks import Shape

PLAIN = Shape(classes=8)


@pytest.fixture
def typed(compiled):
    """A float16 ONNX file."""
    return compiled(PLAIN).onnx


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that stands in for an SDK, where compiler processes find it; returns its Sdk."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def write(source, name="stand_in"):
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
        return Sdk(name, "Stand-in", needs_gpu=False, install="pip install stand-in")

    return write


@pytest.fixture
def recorded(module, monkeypatch, tmp_path):
    """Has ``build`` use the real compiler and note the process id of each process that imports it."""
    sdk = module(f"""
        import os, sys, tensorrt_rtx
        with open({str(tmp_path / "pids")!r}, "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        sys.modules[__name__] = tensorrt_rtx
    """)
    monkeypatch.setattr(importlib.import_module("engines.build"), "sdk_for_build", lambda name, cards: sdk)
    return lambda: [int(line) for line in (tmp_path / "pids").read_text().split()]


def is_running(pid):
    """Whether a process is there and not a zombie."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def asked_of(sdk, onnx_path="missing.onnx", engine="none.engine"):
    """Starts a compiler process of its own, submits, and waits for its answer."""
    with CompilerProcess(sdk) as process:
        process.submit(Request(str(onnx_path), str(engine), (1, 8, 32), ()))
        return process.result()


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def graph_of(*nodes, output=("N", 3, 4, 4), domain=""):
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 4, 4])
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, output)
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(helper.make_graph(nodes, "graph", [image], [result]), opset_imports=opsets, ir_version=8)
    assumptions = json.dumps({"mean": "0,0,0", "std": "1,1,1", "size": "4x4"})
    helper.set_model_props(model, {"precision": "fp16", "checkpoint_sha256": "0" * 64, "assumptions": assumptions})
    return model


# --- the real compiler, when all is well


def test_a_build_makes_the_engine_and_says_how(typed, tmp_path):
    made = build(typed, tmp_path / "net.engine")
    assert isinstance(made, Build)
    assert (made.engine, made.sidecar) == (tmp_path / "net.engine", tmp_path / "net.engine.json")
    assert made.manifest.sdk == {"name": "tensorrt_rtx", "version": header_from_file(made.engine).version_text}
    assert made.warnings == ()
    assert 0 < made.seconds < 60
    assert made.audit.line == "7 of 7 convs in FP16, Conv+ReLU in one kernel each, all 8 weights bit-equal"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.engine", "net.engine.json"]
    assert [kernel.weight_dtype for kernel in plan_from_file(made.engine).convolutions] == ["float16"] * 7


@pytest.mark.parametrize(
    ("asked", "cards", "newer"),
    [((), (80, 86, 89, 120, 121), True), ((86,), (86,), False), ((86, 89), (86, 89), False), ((75,), (75,), False)],
)
def test_the_engine_is_for_the_cards_that_were_asked_for(typed, tmp_path, asked, cards, newer):
    header = header_from_file(build(typed, tmp_path / "net.engine", gpu=asked).engine)
    assert (header.compute_capabilities, header.newer_cards) == (cards, newer)


@pytest.mark.parametrize(("batch", "bounds"), [((1, 8, 32), b"[1, 32]"), ((2, 4, 16), b"[2, 16]")])
def test_the_profile_has_the_batches_that_were_asked_for(typed, tmp_path, batch, bounds):
    data = build(typed, tmp_path / "net.engine", batch=batch).engine.read_bytes()
    assert re.findall(rb"shape input value at index 0 is out of bounds (\[\d+, \d+\])", data) == [bounds]
    assert re.findall(rb'memset=\{ name="\w+" output=\{"__s\^%di64"' % batch[1], data)


def test_one_batch_alone_makes_a_static_engine(typed, tmp_path):
    data = build(typed, tmp_path / "net.engine", batch=(4, 4, 4)).engine.read_bytes()
    assert b"out of bounds" not in data
    assert b'dims={ 4 3 32 32 } mem_prop=0 name="input' in data


def test_progress_is_told_in_order_and_ends(typed, tmp_path):
    told = []
    build(typed, tmp_path / "net.engine", progress=lambda *step: told.append(step))
    assert told[0][:2] == ("Building engine", 0)
    assert told[-1][0] == "Building engine"
    phases = {phase: [(done, steps) for name, done, steps in told if name == phase] for phase, _, _ in told}
    assert len(phases) > 3
    for phase, steps in phases.items():
        assert steps[0][0] == 0, phase
        assert steps[-1][0] == steps[-1][1], phase
        for (before, total), (after, _) in itertools.pairwise(steps):
            assert after in (before, before + 1) or (after == 0 and before == total), phase


def test_nothing_has_the_engines_name_until_it_is_whole(typed, tmp_path):
    seen = []
    build(typed, tmp_path / "net.engine", progress=lambda *step: seen.append((tmp_path / "net.engine").exists()))
    assert set(seen) == {False}
    assert header_from_file(tmp_path / "net.engine").size == (tmp_path / "net.engine").stat().st_size


# --- one fresh process for each engine


def test_every_build_has_a_process_of_its_own(typed, tmp_path, recorded):
    build(typed, tmp_path / "a.engine")
    build(typed, tmp_path / "b.engine")
    pids = recorded()
    assert len({*pids, os.getpid()}) == 3
    assert not any(is_running(pid) for pid in pids)


def test_a_build_after_a_failed_one_is_byte_for_byte_the_one_before_it(compiled, typed, tmp_path):
    before = build(typed, tmp_path / "before.engine").engine.read_bytes()
    with pytest.raises(CompilerRefused):
        build(compiled(PLAIN, "fp32").onnx, tmp_path / "turing.engine", gpu=(75,))
    assert build(typed, tmp_path / "after.engine").engine.read_bytes() == before
    made = ["after.engine", "after.engine.json", "before.engine", "before.engine.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made


def test_a_build_that_is_given_up_leaves_no_process_and_no_file(typed, tmp_path, recorded):
    def interrupt(*_):
        raise KeyboardInterrupt

    target = tmp_path / "out" / "net.engine"
    target.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        build(typed, target, progress=interrupt)
    assert [is_running(pid) for pid in recorded()] == [False]
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("submitted", [True, False], ids=["compiling", "waiting for a request"])
def test_the_compiler_dies_with_the_process_that_asked(module, tmp_path, submitted):
    note = tmp_path / "pid"
    module(f"""
        import os, pathlib, time

        def note():
            pathlib.Path({str(note)!r} + ".new").write_text(str(os.getpid()))
            os.replace({str(note)!r} + ".new", {str(note)!r})

        def __getattr__(name):
            if name.startswith("__"):
                raise AttributeError(name)
            note()
            time.sleep(300)

        {"" if submitted else "note()"}
    """)
    asking = f"""
        import time
        from engines.compilation import CompilerProcess
        from engines.compiler import Request
        from engines.sdk import Sdk
        with CompilerProcess(Sdk("stand_in", "Stand-in", needs_gpu=False, install="")) as process:
            if {submitted}:
                process.submit(Request("a.onnx", "a.engine", (1, 8, 32), ()))
                process.result()
            time.sleep(300)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(asking)], env=environment, cwd=tmp_path)
    child = None
    try:
        assert wait_until(note.exists, 30)
        child = int(note.read_text())
        assert is_running(child)
        parent.kill()
        parent.wait()
        assert wait_until(lambda: not is_running(child), 2)
    finally:
        parent.kill()
        parent.wait()
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_the_working_directory_is_not_where_the_compiler_looks_for_its_modules(typed, tmp_path, monkeypatch):
    """A json.py among the user's own files must not become a part of the compiler."""
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong json')")
    monkeypatch.chdir(tmp_path)
    assert build(typed, "net.engine").engine.is_file()


# --- what cannot be built


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_an_onnx_file_that_is_not_there_is_rejected(tmp_path, kind):
    path = tmp_path if kind == "directory" else tmp_path / "missing.onnx"
    with pytest.raises(InputRejected) as error:
        build(path, tmp_path / "net.engine")
    assert one_line(error) == f"{path}: no such ONNX file; export it first with --onnx"
    assert list(tmp_path.iterdir()) == []


def refused(model, tmp_path, **options):
    """The one line of a refusal; checks that it left nothing and that an older engine is still there."""
    path, target = tmp_path / "net.onnx", tmp_path / "net.engine"
    path.write_bytes(model)
    target.write_bytes(b"an older engine")
    with pytest.raises(CompilerRefused) as error:
        build(path, target, **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.engine", "net.onnx"]
    assert target.read_bytes() == b"an older engine"
    assert error.value.exit_code == 4
    message = one_line(error)
    assert message.startswith("TensorRT for RTX refused the graph: ")
    return message


@pytest.mark.parametrize("kind", ["text", "empty", "cut short"])
def test_a_file_that_is_no_onnx_is_rejected_before_anything_is_compiled(typed, tmp_path, monkeypatch, kind):
    content = typed.read_bytes()
    path = tmp_path / "net.onnx"
    path.write_bytes(
        {"text": b"no ONNX file, but text" * 50, "empty": b"", "cut short": content[: len(content) // 2]}[kind]
    )
    monkeypatch.setattr(importlib.import_module("engines.build"), "CompilerProcess", pytest.fail)
    with pytest.raises(InputRejected) as error:
        build(path, tmp_path / "net.engine")
    assert one_line(error).startswith(f"{path}: not a whole ONNX file (")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("key", ["precision", "checkpoint_sha256", "assumptions"])
def test_a_graph_that_the_exporter_did_not_write_is_rejected_before_anything_is_compiled(
    typed, tmp_path, monkeypatch, key
):
    model = onnx.load(typed)
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != key}
    del model.metadata_props[:]
    helper.set_model_props(model, kept)
    onnx.save(model, tmp_path / "net.onnx")
    monkeypatch.setattr(importlib.import_module("engines.build"), "CompilerProcess", pytest.fail)
    with pytest.raises(InputRejected, match=f"its metadata has no {key}, so the exporter did not write it"):
        build(tmp_path / "net.onnx", tmp_path / "net.engine")


@pytest.mark.parametrize(
    ("operation", "domain", "output"),
    [("Frobnicate", "nobody", ("N", 3, 4, 4)), ("Det", "", ("N", 3))],
    ids=["unknown", "unsupported"],
)
def test_an_operation_that_the_parser_does_not_take_is_named(tmp_path, operation, domain, output):
    node = helper.make_node(operation, ["input"], ["output"], name="body/odd", domain=domain)
    message = refused(graph_of(node, output=output, domain=domain).SerializeToString(), tmp_path)
    assert operation in message
    assert "body/odd" in message


def test_float32_for_turing_is_refused_in_the_compilers_words_with_the_way_out(compiled, tmp_path):
    message = refused(compiled(PLAIN, "fp32").onnx.read_bytes(), tmp_path, gpu=(75,))
    assert "Cannot compile operation 'head/Gemm' for Turing (SM75): FP32 GEMM is not supported" in message
    assert message.endswith("[Turing (sm75) takes fp16 only: use --trt fp16, or leave sm75 out of --gpu]")


def test_batches_out_of_order_are_not_blamed_on_the_driver(typed, tmp_path):
    with pytest.raises(ReportedError) as error:
        build(typed, tmp_path / "net.engine", batch=(8, 4, 2))
    assert one_line(error).startswith("--batch: 8:4:2 is not MIN:OPT:MAX")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu": (75, 86)}, "sm75 must have an engine of its own"),
        ({"gpu": (90,)}, "TensorRT for RTX has no such target"),
        ({"sdk": "onnxruntime"}, "--sdk onnxruntime: unknown"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_before_anything_starts(typed, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(importlib.import_module("engines.build"), "CompilerProcess", pytest.fail)
    with pytest.raises(ReportedError, match=said):
        build(typed, tmp_path / "net.engine", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["no directory", "directory is a file", "target is a directory"])
def test_a_target_that_cannot_be_written_is_reported_by_its_own_name(typed, tmp_path, kind):
    target = tmp_path / "out" / "net.engine"
    if kind == "directory is a file":
        target.parent.write_text("")
    elif kind == "target is a directory":
        target.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputFailed) as error:
        build(typed, target)
    assert one_line(error).startswith(f"{target}: cannot be written (")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(typed, tmp_path):
    asking = f"""
        import resource
        from engines.build import build
        from engines.errors import OutputFailed
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            build({str(typed)!r}, "net.engine")
        except OutputFailed as error:
            print(error)
    """
    done = run_process(["-c", textwrap.dedent(asking)], tmp_path, timeout=60)
    assert done.stdout.startswith("net.engine: cannot be written (File too large)"), done
    assert list(tmp_path.iterdir()) == []


# --- compilers that do not work


@pytest.mark.parametrize(
    "statement",
    [
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')",
        "raise OSError('libnvinfer.so.11: cannot open shared object file')",
        "raise RuntimeError('libnvinfer.so.11: cannot open shared object file\\nand more')",
        "import no_such_module_libnvinfer_so_11",
    ],
)
def test_an_sdk_that_cannot_be_imported_is_missing(module, statement):
    with pytest.raises(SdkMissing) as error:
        asked_of(module(statement))
    message = one_line(error)
    assert message.startswith("Stand-in is installed but does not start (")
    assert "libnvinfer" in message
    assert message.endswith("; pip install stand-in")
    assert error.value.exit_code == 4


AT_FIRST_USE = """
import os, sys
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    {}
"""


@pytest.mark.parametrize(
    ("source", "said"),
    [
        pytest.param("import os; os._exit(3)", "status 3", id="exits when imported"),
        pytest.param(AT_FIRST_USE.format("os._exit(3)"), "status 3", id="exits"),
        pytest.param(AT_FIRST_USE.format("os._exit(0)"), "status 0", id="exits as if all were well"),
        pytest.param(AT_FIRST_USE.format("os.abort()"), "status -6", id="aborts"),
        pytest.param(AT_FIRST_USE.format("os.kill(os.getpid(), 9)"), "status -9", id="is killed"),
        pytest.param(
            AT_FIRST_USE.format("os.write(2, b'one\\nfree(): bad pointer\\n'); os._exit(3)"),
            "free(): bad pointer",
            id="last words",
        ),
    ],
)
def test_a_compiler_that_dies_without_an_answer_is_reported(module, source, said):
    started = time.monotonic()
    with pytest.raises(CompilerRefused) as error:
        asked_of(module(source))
    message = one_line(error)
    assert message.startswith("Stand-in ended with")
    assert said in message
    assert time.monotonic() - started < 20


def test_what_a_compiler_prints_is_not_taken_for_its_answer(module):
    source = AT_FIRST_USE.format("os.write(1, b'more noise\\n'); raise RuntimeError('its own words')")
    with pytest.raises(CompilerRefused) as error:
        asked_of(module("print('noise', flush=True)\n" + source))
    assert one_line(error) == "Stand-in refused the graph: RuntimeError: its own words"


def test_a_long_message_of_many_lines_becomes_one_short_line(module):
    words = "first line\\n" + "x" * 5000
    with pytest.raises(CompilerRefused) as error:
        asked_of(module(AT_FIRST_USE.format(f"raise RuntimeError('{words}')")))
    assert one_line(error) == "Stand-in refused the graph: RuntimeError: first line"
    with pytest.raises(CompilerRefused) as error:
        asked_of(module(AT_FIRST_USE.format(f"raise RuntimeError('{words[12:]}')")))
    assert len(one_line(error)) < 500


def test_an_answer_that_is_never_asked_for_leaves_no_process(module, tmp_path):
    sdk = module(f"""
        import os, pathlib
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
    """)
    with CompilerProcess(sdk):
        assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 30)
    assert not is_running(int((tmp_path / "pid").read_text()))


# --- the interface of the SDKs


INTERFACES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "severity": "ILogger.Severity",
}


def names_used_by_the_compiler():
    """("Builder", "create_network"), ...: each attribute of an SDK object in ``engines.compiler``."""
    used = set()
    for node in ast.walk(ast.parse(inspect.getsource(compiler))):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node).split(".")
            if dotted[0] == "trt":
                used.add(("", ".".join(dotted[1:])))
            elif dotted[0] in INTERFACES:
                used.add((INTERFACES[dotted[0]], dotted[1].partition("(")[0]))
    return used


def test_every_name_that_the_compiler_process_uses_is_in_the_real_bindings():
    import tensorrt_rtx

    used = names_used_by_the_compiler()
    assert {owner for owner, _ in used} >= {"", "Builder", "INetworkDefinition", "OnnxParser", "IBuilderConfig"}
    for owner, name in sorted(used):
        thing = tensorrt_rtx
        for part in [*filter(None, owner.split(".")), *name.split(".")]:
            assert hasattr(thing, part), f"{owner}.{name}"
            thing = getattr(thing, part)


def test_the_names_behind_calls_and_strings_are_in_the_real_bindings():
    """What the walk over the source cannot see: results of calls, names put together, methods that are overridden."""
    import tensorrt_rtx

    from engines.sdk import RTX_CARDS

    assert {f"SM{card}" for card in RTX_CARDS} <= set(tensorrt_rtx.ComputeCapability.__members__)
    assert {"desc", "node_name", "node_operator"} <= set(dir(tensorrt_rtx.ParserError))
    assert {"log"} <= set(dir(tensorrt_rtx.ILogger))
    assert {"phase_start", "step_complete", "phase_finish"} <= set(dir(tensorrt_rtx.IProgressMonitor))
    assert {"name", "shape"} <= set(dir(tensorrt_rtx.ITensor))
    assert {"INTERNAL_ERROR", "ERROR", "VERBOSE", "INFO"} <= set(tensorrt_rtx.ILogger.Severity.__members__)
    assert isinstance(tensorrt_rtx.__version__, str)


class FullTensorRT:
    """The few names of full TensorRT 11 that a build uses. Like the real one it has no ComputeCapability."""

    class ILogger:
        class Severity:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class IProgressMonitor:
        pass

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = 0

    class BuilderFlag:
        TF32, VERSION_COMPATIBLE = "TF32", "VERSION_COMPATIBLE"

    class MemoryPoolType:
        WORKSPACE = "WORKSPACE"

    class HardwareCompatibilityLevel:
        AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = "ampere and later", "this capability"

    class Tensor:
        name, shape = "input", (-1, 3, 32, 32)

    class Network:
        num_inputs = 1

        def get_input(self, index):
            return FullTensorRT.Tensor()

    class TimingCache:
        def __init__(self, content):
            self.content = content

        def serialize(self):
            return memoryview(self.content + b" and what this build measured")

    class Config:
        # As with the real one, no other attribute can be set.
        __slots__ = (
            "builder_optimization_level",
            "flags",
            "hardware_compatibility_level",
            "limits",
            "profiles",
            "progress_monitor",
            "timing_cache",
        )

        def __init__(self):
            self.flags, self.limits, self.timing_cache = {"TF32"}, {}, None

        def add_optimization_profile(self, profile):
            self.profiles = [profile]

        def set_flag(self, flag):
            self.flags.add(flag)

        def clear_flag(self, flag):
            self.flags.remove(flag)

        def set_memory_pool_limit(self, pool, size):
            self.limits[pool] = size

        def create_timing_cache(self, content):
            return None if content == b"damaged" else FullTensorRT.TimingCache(content)

        def set_timing_cache(self, cache, ignore_mismatch):
            self.timing_cache = cache
            return not ignore_mismatch and cache.content != b"of another GPU"

    class Profile:
        def set_shape(self, name, *shapes):
            self.shapes = {name: shapes}

    class Builder:
        def __init__(self, logger):
            self.flags = None

        def create_network(self, flags):
            self.flags = flags
            return FullTensorRT.Network()

        def create_builder_config(self):
            return FullTensorRT.Config()

        def create_optimization_profile(self):
            return FullTensorRT.Profile()

        def build_serialized_network(self, network, config):
            return (self.flags, config)

    class OnnxParser:
        def __init__(self, network, logger):
            pass

        def parse_from_file(self, path):
            return True


SIZES = ((16, 24), (32, 32), (64, 48))


def configured(cards=(), sizes=None, **options):
    """The flags of the network and the configuration that full TensorRT is given, and the timing cache after it."""
    request = Request("a.onnx", "a.engine", (1, 8, 32), cards, Options(**options), sizes)
    compiled = engine_from_onnx(FullTensorRT, request, lambda message: None)
    return *compiled.engine, compiled.timing_cache


@pytest.mark.parametrize("cards", [(), (86,)])
def test_full_tensorrt_builds_for_the_card_that_it_runs_on_even_if_that_card_is_named(cards):
    flags, config, cache = configured(cards)
    assert flags == 1  # strongly typed
    assert config.profiles[0].shapes == {"input": ((1, 3, 32, 32), (8, 3, 32, 32), (32, 3, 32, 32))}
    assert (config.limits, config.timing_cache, cache) == ({}, None, b"")
    assert not hasattr(config, "builder_optimization_level")
    assert not hasattr(config, "hardware_compatibility_level")


def test_where_height_and_width_are_free_the_profile_covers_batch_and_size(monkeypatch):
    monkeypatch.setattr(FullTensorRT.Tensor, "shape", (-1, 3, -1, -1))
    _, config, _ = configured(sizes=SIZES)
    assert config.profiles[0].shapes == {"input": ((1, 3, 16, 24), (8, 3, 32, 32), (32, 3, 64, 48))}


@pytest.mark.parametrize(
    ("shape", "sizes", "said"),
    [
        (
            (-1, 3, -1, -1),
            None,
            "input input is of any height and width; give the engine's sizes as --size MIN:OPT:MAX",
        ),
        (
            (-1, 3, 32, 32),
            SIZES,
            "the size of input input is fixed in the graph, and sizes were given; leave out --size",
        ),
        (
            (-1, 3, -1, 32),
            SIZES,
            "input input has free extents other than batch, height and width: (None, 3, None, 32)",
        ),
        ((-1, -1, 32, 32), SIZES, "input input has free extents other than batch, height and width: (None, None, 32"),
        ((-1, -1, 3), None, "input input has free extents other than batch, height and width: (None, None, 3)"),
        ((-1, -1, -1, -1), SIZES, "input input has free extents other than batch, height and width: (None, None, No"),
    ],
)
def test_a_size_that_is_missing_or_too_much_is_refused_before_anything_is_compiled(monkeypatch, shape, sizes, said):
    monkeypatch.setattr(FullTensorRT.Tensor, "shape", shape)
    monkeypatch.setattr(FullTensorRT.Builder, "build_serialized_network", None)
    with pytest.raises(compiler.Refusal) as raised:
        configured(sizes=sizes)
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize("options", [{}, {"version_compatible": True}])
def test_tf32_is_never_left_on(options):
    _, config, _ = configured(**options)
    assert config.flags == ({"VERSION_COMPATIBLE"} if options else set())


@pytest.mark.parametrize(
    ("level", "given"), [("ampere_plus", "ampere and later"), ("same_compute_capability", "this capability")]
)
def test_full_tensorrt_is_given_every_option(level, given):
    _, config, _ = configured(workspace=3, hardware_compatibility=level, optimization_level=0)
    assert config.limits == {"WORKSPACE": 3 * 2**20}
    assert config.hardware_compatibility_level == given
    assert config.builder_optimization_level == 0


def test_a_timing_cache_starts_empty_or_with_what_is_in_its_file(tmp_path):
    path = tmp_path / "kernels.cache"
    assert configured(timing_cache=str(path))[2] == b" and what this build measured"
    path.write_bytes(b"measured earlier")
    _, config, cache = configured(timing_cache=str(path))
    assert config.timing_cache.content == b"measured earlier"
    assert cache == b"measured earlier and what this build measured"


@pytest.mark.parametrize("content", [b"damaged", b"of another GPU"])
def test_a_timing_cache_that_does_not_fit_is_refused_and_not_ignored(tmp_path, content):
    path = tmp_path / "kernels.cache"
    path.write_bytes(content)
    with pytest.raises(compiler.Refusal, match=r"kernels\.cache is damaged, or of another version or GPU; remove it"):
        configured(timing_cache=str(path))
    assert path.read_bytes() == content


BUILDS_AN_ENGINE = """
FullTensorRT.Builder.build_serialized_network = lambda *arguments: b"an engine"
__version__ = "11.4.0.106"

def __getattr__(name):
    return getattr(FullTensorRT, name)
"""


@pytest.fixture
def with_cache(module):
    """A compiler process of the stand-in for full TensorRT; its answer to a request with that timing cache."""
    sdk = module(inspect.getsource(FullTensorRT) + BUILDS_AN_ENGINE)

    def ask(engine, cache):
        with CompilerProcess(sdk) as process:
            process.submit(Request("a.onnx", str(engine), (1, 8, 32), (), Options(timing_cache=str(cache))))
            return process.result()

    return ask


def test_the_timing_cache_is_written_back_beside_an_engine_that_was_made(with_cache, tmp_path):
    cache = tmp_path / "kernels.cache"
    for before in (b"", b" and what this build measured"):
        made = with_cache(tmp_path / "net.engine", cache)
        assert (made.sdk_version, made.engine.read_bytes()) == ("11.4.0.106", b"an engine")
        assert cache.read_bytes() == before + b" and what this build measured"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.cache", "modules", "net.engine"]


def test_a_timing_cache_that_cannot_be_written_is_named(with_cache, tmp_path):
    cache = tmp_path / "missing" / "kernels.cache"
    with pytest.raises(OutputFailed) as error:
        with_cache(tmp_path / "net.engine", cache)
    assert one_line(error) == (
        f"{cache}: cannot be written (No such file or directory); "
        f"give --timing-cache a file that can be written, or leave it out"
    )


def test_a_request_survives_its_json():
    for options in (Options(), Options(4096, "t.cache", version_compatible=True, optimization_level=5)):
        for sizes in (None, SIZES):
            request = Request("a b.onnx", "ä.engine", (1, 8, 32), (86, 89), options, sizes)
            assert Request.from_json(json.dumps(dataclasses.asdict(request))) == request


# --- options


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"timing_cache": "t.cache"}, "--timing-cache: not for TensorRT for RTX: it has none"),
        ({"version_compatible": True}, "--version-compatible: not for TensorRT for RTX: its engines run in the very"),
        ({"hardware_compatibility": "ampere_plus"}, "--hardware-compatibility: not for TensorRT for RTX: it takes no"),
    ],
)
def test_what_tensorrt_for_rtx_would_ignore_is_refused_there_and_only_there(typed, tmp_path, monkeypatch, option, said):
    monkeypatch.setattr(importlib.import_module("engines.build"), "CompilerProcess", pytest.fail)
    with pytest.raises(UsageError) as error:
        build(typed, tmp_path / "net.engine", options=Options(**option))
    assert one_line(error).startswith(said)
    assert one_line(error).endswith("; leave it out, or build with --sdk tensorrt")
    full, rtx = SDKS
    check_options(full, Options(**option))
    check_options(rtx, Options(workspace=1024, optimization_level=5))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"workspace": 0}, "--workspace: 0 MiB is outside 1 to 1048576"),
        ({"workspace": 2**20 + 1}, "--workspace: 1048577 MiB is outside"),
        ({"hardware_compatibility": "none"}, "choose from ampere_plus, same_compute_capability"),
        ({"optimization_level": 6}, "--optimization-level: 6 is outside 0 to 5"),
        ({"optimization_level": -1}, "--optimization-level: -1 is outside 0 to 5"),
        ({"timing_cache": "."}, "--timing-cache .: a directory; name a file"),
    ],
)
def test_an_option_that_no_sdk_takes_is_a_usage_error(option, said):
    with pytest.raises(UsageError) as error:
        Options(**option)
    assert said in one_line(error)


def test_a_workspace_that_is_too_small_is_refused_with_the_way_out(typed, tmp_path):
    message = refused(typed.read_bytes(), tmp_path, options=Options(workspace=1))
    assert "workspace limit" in message
    assert message.endswith(
        "[the compiler found no kernel within its memory limit: free memory, or give a larger --workspace]"
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_real_compiler_is_told_not_to_round_float32_to_tf32(compiled, tmp_path, monkeypatch, precision):
    """The plan's program says so itself: tf32=0, where the compiler's default gives tf32=1."""
    import tensorrt_rtx

    def setting(options):
        monkeypatch.setattr(compiler, "_set_options", options)
        request = Request(str(compiled(PLAIN, precision).onnx), "", (1, 8, 32), (86,))
        engine = bytes(engine_from_onnx(tensorrt_rtx, request, lambda message: None).engine)
        return re.findall(rb"\n  tf32=(\d)\n", engine)

    assert setting(compiler._set_options) == [b"0"]
    assert setting(lambda *arguments: None) == [b"1"]


# --- the engine and its sidecar


def test_the_sidecar_is_accepted_by_the_checks_of_an_engine(typed, tmp_path):
    made = build(typed, tmp_path / "net.engine", gpu=(86,), batch=(2, 4, 16))
    header, manifest = checked_engine(made.engine)
    assert manifest.to_json() == made.manifest.to_json()
    assert manifest.compute_capabilities == header.compute_capabilities == (86,)
    assert manifest.profile == {"input": tuple((batch, 3, 32, 32) for batch in (2, 4, 16))}
    assert manifest.sha256["onnx"] == sha256_of(typed)


@pytest.fixture
def mixed_up(compiled, monkeypatch):
    """Has the compiler compile another network than it was asked to."""
    other = compiled(PLAIN, seed=2).onnx
    submit = CompilerProcess.submit
    swap = lambda process, request: submit(process, dataclasses.replace(request, onnx=str(other)))  # noqa: E731
    monkeypatch.setattr(CompilerProcess, "submit", swap)


def test_an_engine_of_other_weights_is_rejected_and_kept_and_the_older_one_stays(typed, tmp_path, mixed_up):
    target = tmp_path / "net.engine"
    target.write_bytes(b"an older engine")
    with pytest.raises(VerificationFailed) as error:
        build(typed, target)
    message = one_line(error)
    assert message.startswith(f"{target}: engine audit: stage0.0/Conv: its weights do not stand in the engine")
    assert message.endswith("kept as net.engine.rejected, do not use it")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.engine", "net.engine.rejected"]
    assert target.read_bytes() == b"an older engine"
    assert header_from_file(tmp_path / "net.engine.rejected").sdk == "tensorrt_rtx"


def test_a_sidecar_that_cannot_be_placed_takes_the_engine_back(typed, tmp_path):
    target = tmp_path / "net.engine"
    target.write_bytes(b"an older engine")
    (tmp_path / "net.engine.json").mkdir()
    with pytest.raises(OutputFailed, match=r"net\.engine\.json: cannot be written"):
        build(typed, target)
    assert target.read_bytes() == b"an older engine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.engine", "net.engine.json"]


@pytest.mark.parametrize(
    ("onnx_name", "options", "said"),
    [
        ("net.engine", {}, "--out would take the place of the ONNX file"),
        ("net.engine.json", {}, "the sidecar would take the place of the ONNX file"),
        ("net.onnx", {"timing_cache": "net.onnx"}, "--timing-cache would take the place of the ONNX file"),
        ("net.onnx", {"timing_cache": "net.engine"}, "--timing-cache would take the place of --out"),
    ],
)
def test_nothing_takes_the_place_of_another_file_of_the_build(typed, tmp_path, monkeypatch, onnx_name, options, said):
    monkeypatch.chdir(tmp_path)
    content = typed.read_bytes()
    (tmp_path / onnx_name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        build(onnx_name, tmp_path / "net.engine", options=Options(**options))
    assert (tmp_path / onnx_name).read_bytes() == content


def test_a_path_with_spaces_and_other_letters_is_built(typed, tmp_path):
    folder = tmp_path / "Müller & Söhne 模型"
    folder.mkdir()
    (folder / "a b.onnx").write_bytes(typed.read_bytes())
    build(folder / "a b.onnx", folder / "a b.engine")
    assert sorted(path.name for path in folder.iterdir()) == ["a b.engine", "a b.engine.json", "a b.onnx"]


def test_an_onnx_file_with_external_data_is_built(typed, tmp_path):
    onnx.save(
        onnx.load(typed), tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0
    )
    build(tmp_path / "net.onnx", tmp_path / "external.engine")
    build(typed, tmp_path / "inside.engine")
    assert (tmp_path / "external.engine").read_bytes() == (tmp_path / "inside.engine").read_bytes()
