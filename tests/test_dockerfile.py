"""The Dockerfile, on a machine without Docker: what it says is parsed, and its steps run in plain environments.

The ``serve`` stage is carried out in full: its COPY lines, its RUN line with its ENV, its health check on a good and on
a tampered export. (pip compiles no bytecode and may use its cache, which only saves time.) Of the ``export`` stage,
whose torch would take minutes to install again, pip says what its RUN line would install here: nothing but the project,
so that the environment of these tests, in which everything else runs, is what that line makes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import venv

import pytest
import torch

import exporter
from tests.conftest import EXAMPLES, ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
DOCKERIGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGETS = ("export", "serve")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = (
    ".git/config", ".venv/bin/python", "tests/conftest.py", "examples/fashion.pt", "fashion/fashion.onnx", "model.pt",
    "benchmarks/export_time.py", ".ci/run", "Makefile", "engines/__pycache__/cli.cpython-311.pyc",
)  # fmt: skip
SECRET = re.compile(r"(?i)token|secret|passw|credential|api_?key|://[^/\s]*@")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """As in ``RUN`` and ``pip install .``, with continuation lines joined."""

    keyword: str
    text: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """A target: its own instructions after those of the stages that it is made from; ``base`` is the image below."""

    name: str
    base: str
    instructions: tuple[Instruction, ...]

    def texts(self, keyword):
        return [one.text for one in self.instructions if one.keyword == keyword]

    @property
    def environment(self):
        """What its ENV lines set in the end."""
        return {k: v for text in self.texts("ENV") for k, v in environment_from_text(text).items()}


def instructions_from_dockerfile(text):
    """Comments and empty lines are left out, also between continuation lines."""
    lines = [line.strip() for line in text.splitlines()]
    instructions, pending = [], ""
    for line in lines:
        if not line or line.startswith("#"):
            continue
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        keyword, _, rest = " ".join(pending.split()).partition(" ")
        assert keyword.isupper(), f"not an instruction: {pending!r}"
        assert rest, f"{keyword} of nothing"
        assert "<<" not in rest, "heredocs are not read here"
        instructions.append(Instruction(keyword, rest))
        pending = ""
    assert not pending, f"the last line goes on: {pending!r}"
    return instructions


def stages_from_dockerfile(text):
    stages: dict[str, Stage] = {}
    name = None
    for one in instructions_from_dockerfile(text):
        if one.keyword == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\w+)", one.text).groups()
            parent = stages.get(base)
            stages[name] = Stage(name, parent.base if parent else base, parent.instructions if parent else ())
        else:
            assert name is not None, f"{one.keyword} before FROM"
            stages[name] = dataclasses.replace(stages[name], instructions=(*stages[name].instructions, one))
    return stages


def environment_from_text(text):
    return dict(pair.split("=", 1) for pair in shlex.split(text))


def is_ignored(path, dockerignore):
    """Docker's rule: the last pattern that fits a path, or a directory that it lies in, decides; ! takes it back."""
    ignored = False
    parts = pathlib.PurePosixPath(path).parts
    for line in dockerignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        kept = pattern.startswith("!")
        if any(fits("/".join(parts[:depth]), pattern.lstrip("!")) for depth in range(1, len(parts) + 1)):
            ignored = not kept
    return ignored


def fits(path, pattern):
    """fnmatch's * crosses slashes, Docker's does not; ``**/`` is any directories, none too."""
    names = path.split("/")
    if pattern.startswith("**/"):
        return any(fits("/".join(names[start:]), pattern[3:]) for start in range(len(names)))
    wanted = pattern.split("/")
    return len(names) == len(wanted) and all(map(fnmatch.fnmatchcase, names, wanted))


def shell_lines(readme):
    return [line for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) for line in block.splitlines()]


def problems(dockerfile, dockerignore, readme):
    """Everything that is wrong with them, as (what, where)."""
    stages = stages_from_dockerfile(dockerfile)
    found = [("no target", target) for target in TARGETS if target not in stages]
    for stage in stages.values():
        if not re.fullmatch(r"python:3\.11-slim(-\w+)?", stage.base):
            found.append(("base image", stage.base))
        found += [("not in the README", line) for line in stage.texts("RUN") if line not in shell_lines(readme)]
        for text in stage.texts("COPY"):
            *sources, _ = text.split()
            found += [("no such file", source) for source in sources if not (ROOT / source).exists()]
            found += [("ignored", source) for source in sources if is_ignored(source, dockerignore)]
        found += [("secret", key) for key in [*stage.environment, *stage.texts("ARG")] if SECRET.search(key)]
    for target in TARGETS:
        users = stages[target].texts("USER") if target in stages else []
        if not users or re.match(r"(root|0)\b", users[-1]):
            found.append(("runs as root", target))
        if target in stages and stages[target].instructions[-1].keyword == "RUN":
            found.append(("a step after USER", target))
    found += [("not left out", path) for path in LEFT_OUT if not is_ignored(path, dockerignore)]
    found += [("secret", line) for line in dockerfile.splitlines() if re.search(r"://[^/\s]*@", line)]
    found += [("fetched", one.text) for one in instructions_from_dockerfile(dockerfile) if one.keyword == "ADD"]
    return found


def test_nothing_is_wrong_with_it():
    assert problems(DOCKERFILE, DOCKERIGNORE, README) == []


FAULTS = {
    "a command of its own": ("RUN pip", "RUN apt-get update && pip", "not in the README"),
    "another pip command": ("constraints.txt '.[images", "constraints.txt '.[dev,images", "not in the README"),
    "root in the end": ("USER 10001:10001\nENTRYPOINT", "USER root\nENTRYPOINT", "runs as root"),
    "root by number": ("USER 10001:10001\n# Exit", "USER 10001\nUSER 0:0\n# Exit", "runs as root"),
    "a latest tag": ("python:3.11-slim-bookworm", "python:latest", "base image"),
    "no tag": ("python:3.11-slim-bookworm", "python", "base image"),
    "another Python": ("python:3.11-slim-bookworm", "python:3.10-slim", "base image"),
    "no serve target": ("AS serve", "AS served", "no target"),
    "a file that is gone": ("COPY LICENSE", "COPY LICENCE", "no such file"),
    "a file that is left out": ("COPY engines engines", "COPY tests tests", "ignored"),
    "a secret": ("ENV PYTHONSAFEPATH=1", "ENV HUB_TOKEN=abc", "secret"),
    "a secret argument": ("WORKDIR /source", "ARG PASSWORD", "secret"),
    "an index with a password": ("https://download", "https://me:pw@download", "secret"),
    "something fetched": ("COPY exporter exporter", "ADD https://example.org/x.tar /x", "fetched"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_in_the_dockerfile_is_seen(fault):
    old, new, what = FAULTS[fault]
    assert old in DOCKERFILE
    assert what in {problem for problem, _ in problems(DOCKERFILE.replace(old, new), DOCKERIGNORE, README)}


@pytest.mark.parametrize("path", LEFT_OUT)
def test_an_ignore_file_without_its_star_or_its_pattern_is_seen(path):
    without = "\n".join(line for line in DOCKERIGNORE.splitlines() if line not in ("*", "**/__pycache__", "**/*.pyc"))
    assert ("not left out", path) in problems(DOCKERFILE, without, README)


def test_lines_that_go_on_are_joined_and_comments_left_out():
    text = "# a\nFROM x AS y\nRUN a \\\n  # between\n  b\\\n c\n\nENV A=1 \\\n    B='2 3'\nUSER 5\n"
    assert [(one.keyword, one.text) for one in instructions_from_dockerfile(text)] == [
        ("FROM", "x AS y"), ("RUN", "a bc"), ("ENV", "A=1 B='2 3'"), ("USER", "5"),
    ]  # fmt: skip
    stage = stages_from_dockerfile(text + "FROM y AS z\nENV A=7\n")["z"]
    assert (stage.base, stage.environment, stage.texts("USER")) == ("x", {"A": "7", "B": "2 3"}, ["5"])
    for broken in ("FROM x AS y\nRUN a \\", "RUN a", "FROM x AS y\nrun a", "FROM x AS y\nRUN <<EOF"):
        with pytest.raises(AssertionError):
            stages_from_dockerfile(broken)


@pytest.mark.parametrize(
    ("path", "patterns", "ignored"),
    [
        ("a/b", "a", True),
        ("a/b", "b", False),
        ("a/b.pyc", "**/*.pyc", True),
        ("b.pyc", "**/*.pyc", True),
        ("a/b.pyc", "*.pyc", False),
        ("a/b", "*\n!a", False),
        ("a/b", "!a\n*", True),
        ("a/c/b", "*\n!a\n# c\n\na/c", True),
    ],
)
def test_the_ignore_file_is_read_by_dockers_rule(path, patterns, ignored):
    assert is_ignored(path, patterns) is ignored


STAGES = stages_from_dockerfile(DOCKERFILE)


def test_what_the_images_run():
    export, serve = (STAGES[target] for target in TARGETS)
    assert [json.loads(text) for text in export.texts("ENTRYPOINT")] == [["python", "-m", "exporter"]]
    assert [json.loads(text) for text in serve.texts("ENTRYPOINT")] == [["python", "-m", "engines"]]
    assert export.texts("HEALTHCHECK") == []
    assert len(serve.texts("HEALTHCHECK")) == 1
    assert " CMD python -m engines verify /model || exit 1" in serve.texts("HEALTHCHECK")[0]
    assert json.loads(serve.texts("CMD")[0]) == ["verify", "/model"]
    assert all(stage.environment["PYTHONSAFEPATH"] == "1" for stage in (export, serve))


def test_torch_is_the_pinned_one_without_cuda():
    pinned = re.search(r"(?m)^torch==(\S+)$", (ROOT / "constraints.txt").read_text())[1]
    (command,) = STAGES["export"].texts("RUN")
    assert f" torch=={pinned}+cpu " in command
    assert STAGES["export"].environment["PIP_EXTRA_INDEX_URL"] == CPU_INDEX
    assert "torch" not in "".join(STAGES["serve"].texts("RUN"))
    assert all(" -c constraints.txt " in line for stage in STAGES.values() for line in stage.texts("RUN"))


def test_the_readmes_docker_commands_are_those_of_the_targets():
    section = README.split("\n## Docker\n")[1].split("\n## ")[0]
    builds = re.findall(r"^ +docker build --target (\w+) -t (\S+) \.$", section, re.MULTILINE)
    assert tuple(target for target, _ in builds) == TARGETS
    runs = re.findall(r"^ +docker run (.*)$", section, re.MULTILINE)
    assert len(runs) >= 2
    modules = {"repvgg-exporter": "exporter", "repvgg-serve": "engines"}
    assert {image for _, image in builds} == set(modules)
    for run in runs:
        image = next(image for image in modules if f" {image} " in run)
        arguments = run.split(f" {image} ")[1].replace("/model", "fashion")
        assert f"python -m {modules[image]} {arguments}" in shell_lines(README), run


def step_environment(variables, folder):
    """As in the image: its ENV, and the environment's own Python first."""
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    faster = {"PIP_NO_COMPILE": "1", "PIP_QUIET": "1"}
    return {**own, **{k: v for k, v in variables.items() if k != "PIP_NO_CACHE_DIR"}, **faster, "PATH": path}


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """The serve stage carried out: its instructions in order, in a fresh environment; gives its environment."""
    folder = tmp_path_factory.mktemp("serve")
    venv.create(folder / "venv", with_pip=True)
    source, variables = folder / "source", {}
    source.mkdir()
    for one in STAGES["serve"].instructions:
        if one.keyword == "ENV":
            variables |= environment_from_text(one.text)
        elif one.keyword == "COPY":
            copy_into(source, one.text)
        elif one.keyword == "RUN":
            environment = step_environment(variables, folder / "venv")
            done = subprocess.run(
                ["/bin/sh", "-c", one.text], cwd=source, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
    return step_environment(variables, folder / "venv")


def copy_into(source, text):
    *names, target = text.split()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / target)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Directories with an ONNX file alone, and with an engine, too."""
    graph, engine = (tmp_path_factory.mktemp(name) for name in ("graph", "engine"))
    assert exporter.export(EXAMPLES / "fashion.pt", graph, size=28).passed
    assert exporter.export(EXAMPLES / "fashion.pt", engine, size=28, onnx=False, trt=["fp16"]).passed
    return graph, engine


def run_in(environment, command, cwd):
    return subprocess.run(
        ["/bin/sh", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_serve_has_neither_torch_nor_onnx_and_runs_engines(serve, tmp_path):
    script = "import importlib.util as u; print([m for m in {} if u.find_spec(m)])"
    absent = ["torch", "onnx", "onnxsim", "safetensors", "pytest"]
    done = run_in(serve, f'python -c "{script.format(absent)}"', tmp_path)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
    present = ["engines", "onnxruntime", "tensorrt_rtx", "cuda.bindings.runtime", "PIL"]
    assert run_in(serve, f'python -c "{script.format(present)}"', tmp_path).stdout.strip() == str(present)
    done = run_in(serve, 'python -c "import torch"', tmp_path)
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stderr
    done = run_in(serve, 'python -c "import engines; print(engines.__file__)"', ROOT)
    assert "site-packages" in done.stdout  # the installed one, and not that of the directory


@pytest.mark.slow
def test_the_health_check_passes_a_good_export_and_no_other(serve, exports, tmp_path):
    graph, engine = exports
    command = STAGES["serve"].texts("HEALTHCHECK")[0].split(" CMD ")[1]
    verify = command.removesuffix(" || exit 1")
    assert command != verify

    def health(folder, text=command):
        return run_in(serve, text.replace("/model", shlex.quote(str(folder))), folder)

    assert health(graph).returncode == 0
    copy = shutil.copytree(graph, tmp_path / "copy")
    (copy / "numpy.py").write_text("raise SystemExit(99)")  # the mounted directory is no place to import from
    assert health(copy).returncode == 0
    content = bytearray((copy / "fashion.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "fashion.onnx").write_bytes(content)
    assert health(copy).returncode == 1
    assert "fashion.onnx" in health(copy, verify).stdout
    assert health(tmp_path).returncode == 1  # nothing was mounted
    no_gpu = health(engine, verify)
    assert no_gpu.returncode == 4
    assert "no GPU answers here" in no_gpu.stderr
    assert health(engine).returncode == 1  # Docker knows 0 and 1


@pytest.mark.slow
def test_the_export_stage_needs_nothing_that_is_not_here(tmp_path):
    """pip itself says what the RUN line would install: where nothing, this environment is what the line makes."""
    (command,) = STAGES["export"].texts("RUN")
    if not torch.__version__.endswith("+cpu"):
        pytest.skip(f"torch {torch.__version__} here is not the build for the CPU, which the image has")
    source = tmp_path / "source"
    source.mkdir()
    for text in STAGES["export"].texts("COPY"):
        copy_into(source, text)
    pip, install, *arguments = shlex.split(command)
    assert (pip, install) == ("pip", "install")
    options = ["--dry-run", "--quiet", "--report", str(tmp_path / "report.json")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *arguments],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [one["metadata"]["name"] for one in report["install"]] == ["repvgg-exporter"]
