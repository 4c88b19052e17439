"""What the code may import, from where, and when: the serving side stays light, and --help immediate."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import ROOT, run_process

PACKAGES = ("engines", "exporter")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
ENGINES = [path for path in SOURCES if path.is_relative_to(ROOT / "engines")]
OPTIONAL = (
    "torch", "torchvision", "exporter", "onnx", "onnxsim", "onnxruntime", "onnxscript", "safetensors", "tqdm", "PIL",
    "tensorrt", "tensorrt_rtx", "cuda", "pycuda", "scipy", "pandas",
)  # fmt: skip


def named(path):
    return str(path.relative_to(ROOT))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def text_of(path):
    return path.read_text(encoding="utf-8")


def imports_of(source):
    """(module, whether at the top level of the file) of each import statement."""
    tree = ast.parse(source)
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", id(node) in top


def loaded_after(script, cwd):
    """The modules in sys.modules once ``script`` has run in a fresh process."""
    tail = "\nimport json, sys\nsys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    done = run_process(["-c", textwrap.dedent(script) + tail], cwd)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def roots(modules):
    return {module.partition(".")[0] for module in modules}


def test_there_is_something_to_look_at():
    assert len(ENGINES) >= 8
    assert len(SOURCES) - len(ENGINES) >= 20


# --- the serving side


@pytest.mark.parametrize("path", ENGINES, ids=named)
def test_engines_imports_neither_torch_nor_the_exporter(path):
    imported = roots(module for module, _ in imports_of(text_of(path)))
    assert not imported & {"torch", "exporter"}


@pytest.mark.parametrize("path", ENGINES, ids=named)
def test_engines_imports_the_standard_library_numpy_and_itself_at_the_top(path):
    top = roots(module for module, at_top in imports_of(text_of(path)) if at_top)
    assert top <= {*sys.stdlib_module_names, "numpy", "engines"}


def test_every_module_of_engines_imports_where_nothing_optional_can_be(tmp_path):
    modules = [module_of(path) for path in ENGINES if path.name != "__main__.py"]
    script = f"""
        import importlib, sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {OPTIONAL!r}:
                    raise ImportError(f"{{name}} is blocked")

        sys.meta_path.insert(0, Blocked())
        try:
            import torch
        except ImportError:
            pass
        else:
            raise SystemExit("the block does not work")
        for module in {modules!r}:
            importlib.import_module(module)
    """
    loaded = loaded_after(script, tmp_path)
    assert set(modules) <= loaded
    assert "numpy" in loaded


def test_importing_engines_loads_nothing_heavy(tmp_path):
    loaded = loaded_after("import engines", tmp_path)
    assert "engines" in loaded
    assert not roots(loaded) & set(OPTIONAL)


def test_the_check_on_imports_would_see_a_heavy_one(tmp_path):
    assert "onnx" in roots(loaded_after("import engines, onnx", tmp_path))


def test_the_process_that_compiles_loads_the_sdk_and_nothing_else_that_is_optional(tmp_path):
    script = """
        from engines.compiler import main
        import os, sys
        sys.stdin = open(os.devnull)
        main(["json"])
    """
    assert not roots(loaded_after(script, tmp_path)) & set(OPTIONAL)


# --- the command line


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["--no-such-flag"], ["a.pt", "--trt", "fp64"]], ids=" ".join
)
def test_a_command_that_exports_nothing_imports_neither_numpy_nor_torch(arguments, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "exporter", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == (2 if "-no" in arguments[0] or len(arguments) > 1 else 0), done.stderr
    times = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip() for line in times}
    assert {"exporter", "exporter.cli", "argparse"} <= loaded
    assert not roots(loaded) & ({"numpy", *OPTIONAL} - {"exporter"})


# --- everywhere


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_assert_statement_guards_anything(path):
    """An assert is gone under python -O, and its message is not one for a user."""
    assert asserts_in(text_of(path)) == []


def asserts_in(source):
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def undocumented(source):
    """Each module, class, function and method that is public, and not in something private, and has no docstring."""

    def inside(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
                "_"
            ):
                yield f"{prefix}{node.name}", node
                if isinstance(node, ast.ClassDef):
                    yield from inside(node.body, f"{prefix}{node.name}.")

    tree = ast.parse(source)
    definitions = [("the module", tree), *inside(tree.body, "")]
    return [name for name, node in definitions if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_everything_public_has_a_docstring(path):
    assert undocumented(text_of(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_module_reads_anothers_private_names(path):
    assert private_imports(text_of(path)) == []


def private_imports(source):
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports for alias in node.names if alias.name.startswith("_")]


def test_the_checks_on_the_source_see_what_they_look_for():
    planted = """
import torch.nn
def f():
    from exporter.cli import _request
    assert f
class A:
    'Documented.'
    def b(self): pass
    def _c(self): pass
class _D:
    def e(self): pass
"""
    assert list(imports_of(planted)) == [("torch.nn", True), ("exporter.cli", False)]
    assert asserts_in(planted) == [5]
    assert undocumented(planted) == ["the module", "f", "A.b"]
    assert private_imports(planted) == ["_request"]


def test_every_package_is_in_the_distribution():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
    present = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.name == "__init__.py"}
    assert listed == present
    assert {path.parent for path in SOURCES} == {ROOT / pathlib.Path(*package.split(".")) for package in present}
