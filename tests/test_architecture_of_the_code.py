"""What the code may import, from where, and when: the serving side stays light, and --help immediate."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import tomllib

import pytest

from tests.conftest import ROOT, run_process

PACKAGES = ("engines", "exporter")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
ENGINES = [path for path in SOURCES if path.is_relative_to(ROOT / "engines")]
BENCHMARKS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if path.name != "plain_export.py"]
"""That one is a program of its own, which a benchmark starts."""
OPTIONAL = (
    "torch", "torchvision", "exporter", "onnx", "onnxsim", "onnxruntime", "onnxscript", "safetensors", "tqdm", "PIL",
    "tensorrt", "tensorrt_rtx", "cuda", "pycuda", "pynvml", "matplotlib", "timm", "scipy", "pandas",
)  # fmt: skip
COMPARED_WITH = {"timm", "torchvision", "matplotlib", "pynvml", "tensorrt", "tensorrt_rtx", "cuda"}
FLOORS = ("engines.roofline", "engines.bench", "engines.receipts", "engines.commands")
"""Each stands on those before it, and all of them on the rest of engines."""
ROOF = ("engines.cli", "engines.__main__")
MOST_LINES = 300


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


# --- which part of it stands on which


def floor_of(module):
    above = [floor for floor, package in enumerate(FLOORS, 1) if f"{module}.".startswith(f"{package}.")]
    return len(FLOORS) + 1 if module in ROOF else above[0] if above else 0


def upward(module, source):
    """What ``module`` imports, wherever in it, from a floor above its own."""
    imported = {name for name, _ in imports_of(source) if name.partition(".")[0] == "engines"}
    return sorted(name for name in imported if floor_of(name) > floor_of(module))


def circle_of(imports):
    """The modules of a circle, of which there may be none; ``imports`` are those at the top, by module."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("path", ENGINES, ids=named)
def test_no_part_of_engines_imports_one_that_stands_on_it(path):
    assert upward(module_of(path), text_of(path)) == []


def test_no_modules_import_each_other_in_a_circle():
    tops = {module_of(path): {name for name, top in imports_of(text_of(path)) if top} for path in SOURCES}
    assert circle_of({module: tops.keys() & names - {module} for module, names in tops.items()}) == []


def test_the_checks_on_the_parts_see_what_they_look_for():
    later = "def f():\n    from engines.receipts.receipt import Request\n"
    assert upward("engines.bench.rows", later) == ["engines.receipts.receipt"]
    assert upward("engines.golden", later) == ["engines.receipts.receipt"]
    assert upward("engines.commands.receipt", later) == upward("engines.receipts.replay", later) == []
    assert upward("engines.receipts.replay", "import engines.cli, engines.bench, engines.benchmark") == ["engines.cli"]
    assert set(circle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert circle_of({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize("path", ENGINES, ids=named)
def test_a_module_of_engines_can_be_read_in_one_go(path):
    assert len(text_of(path).splitlines()) < MOST_LINES


@pytest.mark.parametrize("path", BENCHMARKS, ids=named)
def test_a_benchmark_can_be_read_and_refused_without_what_it_may_compare_with(path):
    top = roots(module for module, at_top in imports_of(text_of(path)) if at_top)
    assert not top & COMPARED_WITH


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


def setuptools_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_package_is_in_the_distribution():
    listed = set(setuptools_table()["packages"])
    present = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.name == "__init__.py"}
    assert listed == present
    assert {path.parent for path in SOURCES} == {ROOT / pathlib.Path(*package.split(".")) for package in present}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_beside_the_code_is_in_the_distribution_and_none_is_promised_that_is_not(package):
    folder, patterns = ROOT / package, setuptools_table()["package-data"][package]
    others = {
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
    }
    found = {pattern: {other for other in others if other.match(pattern)} for pattern in patterns}
    assert set().union(*found.values()) == others
    assert all(found.values())
