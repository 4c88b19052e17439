"""What the real Python bindings of three SDKs offer: every name, and the signatures that their docstrings state.

Full TensorRT's bindings have no libraries with them here, so they are imported over stubs: nine C functions that return
nothing. A process can import only one of them, so each is read in a process of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

RTX = "1.7.1.116"
FULL = ("10.16.1.11", "11.4.0.106")
VERSIONS = (*FULL, RTX)
FOLDER = pathlib.Path(sys.prefix) / "bindings"
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins",
)  # fmt: skip
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
READER = """
import importlib, json, sys
module, folder = sys.argv[1:]
if folder:
    sys.path.insert(0, folder)
trt = importlib.import_module(module)
members = {}
for name in dir(trt):
    thing = getattr(trt, name)
    members[name] = thing.__doc__ if isinstance(thing.__doc__, str) else ""
    if isinstance(thing, type):
        for member in dir(thing):
            inner = getattr(thing, member)
            doc = inner.__doc__ if isinstance(getattr(inner, "__doc__", None), str) else ""
            members[f"{name}.{member}"] = doc
            if isinstance(inner, type):
                members.update({f"{name}.{member}.{value}": "" for value in dir(inner)})
sys.stdout.write(json.dumps({"version": trt.__version__, "members": members}))
"""


@dataclasses.dataclass(frozen=True)
class Bindings:
    """One SDK's bindings: docstrings by dotted name, as in ``IExecutionContext.set_input_shape``."""

    version: str
    members: dict[str, str]

    def counts(self, name: str) -> list[range]:
        """How many arguments, without ``self``, each overload of a function takes; empty for what is no function."""
        return argument_counts(self.members[name], name.rpartition(".")[2])


@functools.cache
def bindings_of(version: str) -> Bindings:
    """The bindings of one version, or an error that says how to get them."""
    module, folder, environment = "tensorrt_rtx", "", dict(os.environ)
    if version in FULL:
        module, folder = "tensorrt_bindings", str(FOLDER / version)
        assert (FOLDER / version / module).is_dir(), (
            f"the bindings of TensorRT {version} are not in {FOLDER / version}; make setup installs them"
        )
        environment["LD_LIBRARY_PATH"] = str(stub_libraries(version.partition(".")[0]))
    command = [sys.executable, "-c", READER, module, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{module} {version} cannot be imported; make setup installs it: {done.stderr}"
    found = json.loads(done.stdout)
    assert found["version"] == version, f"{module} is {found['version']}, not {version}; make setup installs it"
    return Bindings(version, found["members"])


@functools.cache
def stub_libraries(major: str) -> pathlib.Path:
    """A directory with the libraries that the bindings load, empty but for the symbols that they ask for."""
    assert shutil.which("gcc"), "gcc compiles the stubs of TensorRT's libraries; install it"
    folder = pathlib.Path(tempfile.mkdtemp(prefix="stubs-"))
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in LIBRARIES:
        soname = f"{library}.so.{major}"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", folder / soname, source], check=True)
    return folder


@functools.cache
def argument_counts(docstring: str, name: str) -> list[range]:
    """Reads pybind11's signatures: ``f(self: A, b: int, c: str = 'x') -> bool``, one a line, numbered if overloaded."""
    counts = []
    for line in docstring.splitlines():
        match = re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", line)
        if match:
            arguments = split(match[1])
            arguments = [argument for argument in arguments if not argument.startswith("self:")]
            needed = sum("=" not in argument for argument in arguments)
            counts.append(range(needed, len(arguments) + 1))
    return counts


def split(arguments: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(arguments):
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parts.append(arguments[start:position].strip())
            start = position + 1
    return [part for part in (*parts, arguments[start:].strip()) if part]
