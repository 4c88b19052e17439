"""Building engines: the real compiler end to end, every way that it can fail, and the processes around it."""

from __future__ import annotations

import ast
import contextlib
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
from engines.build import Build, CompilerProcess, build
from engines.compiler import Request, engine_from_onnx
from engines.errors import CompilerRefused, InputRejected, OutputFailed, ReportedError, SdkMissing
from engines.plan import header_from_file, plan_from_file
from engines.sdk import Sdk
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
    return helper.make_model(helper.make_graph(nodes, "graph", [image], [result]), opset_imports=opsets, ir_version=8)


# --- the real compiler, when all is well


def test_a_build_makes_the_engine_and_says_how(typed, tmp_path):
    made = build(typed, tmp_path / "net.engine")
    assert isinstance(made, Build)
    assert (made.engine, made.sdk, made.warnings) == (tmp_path / "net.engine", "tensorrt_rtx", ())
    assert made.sdk_version == header_from_file(made.engine).version_text
    assert 0 < made.seconds < 60
    assert [path.name for path in tmp_path.iterdir()] == ["net.engine"]
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after.engine", "before.engine"]


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
        from engines.build import CompilerProcess
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


@pytest.mark.parametrize(
    ("model", "said"),
    [
        pytest.param(b"no ONNX file, but text" * 50, "Failed to parse the ONNX model", id="garbage"),
        pytest.param(b"", "Network must have at least one output", id="empty"),
    ],
)
def test_a_file_that_is_no_onnx_is_refused_in_the_compilers_words(tmp_path, model, said):
    assert said in refused(model, tmp_path)


def test_an_onnx_file_cut_short_is_refused(typed, tmp_path):
    content = typed.read_bytes()
    assert "Failed to parse the ONNX model" in refused(content[: len(content) // 2], tmp_path)


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
    assert "asked for a GPU driver" not in one_line(error)
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

    class Tensor:
        name, shape = "input", (-1, 3, 32, 32)

    class Network:
        num_inputs = 1

        def get_input(self, index):
            return FullTensorRT.Tensor()

    class Config:
        __slots__ = ("profiles", "progress_monitor")  # as with the real one, no other attribute can be set

        def add_optimization_profile(self, profile):
            self.profiles = [profile]

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
            return (self.flags, config.profiles[0].shapes)

    class OnnxParser:
        def __init__(self, network, logger):
            pass

        def parse_from_file(self, path):
            return True


@pytest.mark.parametrize("cards", [(), (86,)])
def test_full_tensorrt_builds_for_the_card_that_it_runs_on_even_if_that_card_is_named(cards):
    flags, shapes = engine_from_onnx(
        FullTensorRT, Request("a.onnx", "a.engine", (1, 8, 32), cards), lambda message: None
    )
    assert flags == 1  # strongly typed
    assert shapes == {"input": ((1, 3, 32, 32), (8, 3, 32, 32), (32, 3, 32, 32))}


def test_a_request_survives_its_json():
    request = Request("a b.onnx", "ä.engine", (1, 8, 32), (86, 89))
    line = json.dumps({"onnx": "a b.onnx", "engine": "ä.engine", "batch": [1, 8, 32], "cards": [86, 89]})
    assert Request.from_json(line) == request


def test_a_path_with_spaces_and_other_letters_is_built(typed, tmp_path):
    folder = tmp_path / "Müller & Söhne 模型"
    folder.mkdir()
    (folder / "a b.onnx").write_bytes(typed.read_bytes())
    build(folder / "a b.onnx", folder / "a b.engine")
    assert sorted(path.name for path in folder.iterdir()) == ["a b.engine", "a b.onnx"]


def test_an_onnx_file_with_external_data_is_built(typed, tmp_path):
    onnx.save(
        onnx.load(typed), tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0
    )
    build(tmp_path / "net.onnx", tmp_path / "external.engine")
    build(typed, tmp_path / "inside.engine")
    assert (tmp_path / "external.engine").read_bytes() == (tmp_path / "inside.engine").read_bytes()
