"""The workflow for a model's repository: its steps run here, in order, in a repository like the one it is for."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from xml.etree import ElementTree

import pytest
import torch

from tests.conftest import EXAMPLES, ROOT, run_process

WORKFLOW = EXAMPLES / "ci" / "parity.yml"
BASH = shutil.which("bash")


def document_from_yaml(text):
    """The part of YAML that a workflow needs: mappings, lists, words, quoted words, and ``|`` blocks of lines.

    Raises:
        ValueError: something else stands there, or the indentation makes no sense.
    """
    lines = [(len(raw) - len(raw.lstrip(" ")), raw.strip()) for raw in text.split("\n")]
    if "\t" in text:
        raise ValueError("a tab")
    value, end = _node(lines, _next(lines, 0), 0)
    if _next(lines, end) < len(lines):
        raise ValueError(f"line {end + 1}: indented as nothing before it")
    return value


def _next(lines, at):
    while at < len(lines) and (not lines[at][1] or lines[at][1].startswith("#")):
        at += 1
    return at


def _node(lines, at, indent):
    found = [] if lines[at][1].startswith("- ") else {}
    while (at := _next(lines, at)) < len(lines) and lines[at][0] == indent:
        text = lines[at][1]
        if isinstance(found, list):
            if not text.startswith("- "):
                break
            lines[at] = (indent + 2, text[2:])
            value, at = _node(lines, at, indent + 2)
            found.append(value)
            continue
        key, colon, rest = text.partition(":")
        if not re.fullmatch(r"[\w-]+", key) or not colon or (rest and not rest.startswith(" ")) or key in found:
            raise ValueError(f"line {at + 1}: {text!r}")
        found[key], at = _value(lines, at + 1, indent, rest.strip())
    return found, at


def _value(lines, at, indent, text):
    if text == "|":
        block = []
        while at < len(lines) and (not lines[at][1] or lines[at][0] > indent):
            block.append(lines[at])
            at += 1
        while block and not block[-1][1]:
            block.pop()
        first = block[0][0]
        return "".join(" " * (depth - first if line else 0) + line + "\n" for depth, line in block), at
    if text:
        return _scalar(text), at
    inner = _next(lines, at)
    if inner < len(lines) and lines[inner][0] > indent:
        return _node(lines, inner, lines[inner][0])
    return None, at


def _scalar(text):
    if text.startswith("["):
        return [part.strip() for part in text.removeprefix("[").removesuffix("]").split(",")]
    if text.startswith('"'):
        return text[1:-1]
    return {"true": True, "false": False}.get(text, text)


DOCUMENT = document_from_yaml(WORKFLOW.read_text(encoding="utf-8"))
STEPS = [(job, step) for job, body in DOCUMENT["jobs"].items() for step in body["steps"]]
RUNS = {(job, step["name"]): step["run"] for job, step in STEPS if "run" in step}


def test_the_reader_reads_yaml():
    text = 'a: b c\nd:\n  - e: "1"\n    f: |\n      x\n        y\n\n      z\n  - g: true\nh:\ni: [j, k]\n'
    assert document_from_yaml(text) == {
        "a": "b c",
        "d": [{"e": "1", "f": "x\n  y\n\nz\n"}, {"g": True}],
        "h": None,
        "i": ["j", "k"],
    }


@pytest.mark.parametrize("text", ["a: b\n  c: d\n", "a:\n\tb: c\n", "a: b\na: c\n", "a:b\n", "a:\n    b: c\n  d: e\n"])
def test_the_reader_refuses_what_is_none(text):
    with pytest.raises(ValueError, match=r"line|tab|indented"):
        document_from_yaml(text)


def test_the_workflow_has_what_the_platform_needs():
    assert set(DOCUMENT) == {"name", "on", "permissions", "env", "jobs"}
    assert list(DOCUMENT["jobs"]) == ["export", "gpu"]
    assert DOCUMENT["jobs"]["gpu"]["needs"] == "export"
    assert DOCUMENT["jobs"]["gpu"]["runs-on"] == ["self-hosted", "gpu"]
    for _, step in STEPS:
        assert set(step) <= {"name", "uses", "with", "if", "run"}
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))


def test_what_shows_a_result_also_runs_after_a_failure():
    shows = [step for _, step in STEPS if "SUMMARY" in step.get("run", "") or "junit" in step.get("uses", "")]
    shows += [step for _, step in STEPS if "upload-artifact" in step.get("uses", "")]
    assert len(shows) == 5
    assert {step["if"] for step in shows} == {"always()"}
    others = [step for _, step in STEPS if step not in shows]
    assert not any("if" in step for step in others)


def commands(script):
    """(module, its flags) of each line that calls one of our programs."""
    for line in script.splitlines():
        found = re.search(r"python -m ((?:exporter|engines)[\w.]*(?: (?:verify|run|info|build)\b)?)(.*)", line)
        if found:
            yield found[1], re.findall(r"(?<=\s)--[\w-]+", found[2])


CALLS = [(job, *call) for (job, _), script in RUNS.items() for call in commands(script)]


def test_the_programs_are_called():
    assert [(job, module) for job, module, _ in CALLS] == [
        ("export", "exporter"),
        ("gpu", "engines verify"),
        ("gpu", "exporter"),
    ]
    assert {"--junit", "--trt", "--size", "--out"} <= set(CALLS[0][2])
    assert "--require" in CALLS[2][2]


@pytest.mark.parametrize(("job", "module", "flags"), CALLS, ids=str)
def test_every_flag_is_one_that_the_program_has(job, module, flags, tmp_path):
    done = run_process(["-m", *module.split(), "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(flags) <= set(re.findall(r"--[\w-]+", done.stdout))


def test_what_is_installed_are_extras_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = [line for script in RUNS.values() for line in script.splitlines() if "pip install" in line]
    assert len(installs) == 2
    for line in installs:
        name, extras = re.search(r'"([\w-]+)\[([\w,]+)\] @ git\+\$REPVGG_EXPORTER_GIT"', line).groups()
        assert name == project["name"]
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def made_repository(tmp_path):
    """A model's repository with the example's files, where ``python -m pip`` is written down and installs nothing."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = pip ]; then echo "$@" >> "{tmp_path}/pip.log"; else exec {sys.executable} "$@"; fi\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    work = tmp_path / "repository"
    work.mkdir()
    shutil.copy(EXAMPLES / "fashion.pt", work / DOCUMENT["env"]["CHECKPOINT"])
    shutil.copy(EXAMPLES / "ci" / "test_parity.py", work)
    return work


@pytest.fixture
def repository(tmp_path):
    return made_repository(tmp_path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A repository in which the first job has run, and what each of its steps did."""
    work = made_repository(tmp_path_factory.mktemp("ran"))
    return work, {name: run_step(script, work) for (job, name), script in RUNS.items() if job == "export"}


@pytest.fixture
def exported(ran, repository):
    """A repository of its own with those files."""
    return shutil.copytree(ran[0], repository, dirs_exist_ok=True)


def run_step(script, repository, **environment):
    """A step as the platform runs it."""
    variables = {
        **os.environ,
        "PATH": f"{repository.parent / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CHECKPOINT": DOCUMENT["env"]["CHECKPOINT"],
        "SIZE": "28",
        "REPVGG_EXPORTER_GIT": "https://example.org/repvgg-exporter.git@v1",
        "GITHUB_STEP_SUMMARY": str(repository.parent / "summary.md"),
        **environment,
    }
    variables.pop("PYTEST_ADDOPTS", None)
    command = [BASH, "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=repository, env=variables, capture_output=True, text=True, check=False)


def summary_of(repository):
    path = repository.parent / "summary.md"
    return path.read_text() if path.exists() else ""


def test_the_first_job_runs_through(ran):
    repository, done = ran
    assert {name: (step.returncode, step.stderr) for name, step in done.items()} == dict.fromkeys(done, (0, ""))
    assert list(done) == ["Install", "Export and verify", "Compare the files as they are served", "Summary"]
    assert (repository.parent / "pip.log").read_text() == (
        "-m pip install repvgg-exporter[export,ort,rtx] @ git+https://example.org/repvgg-exporter.git@v1 pytest\n"
    )
    kept = next(step for job, step in STEPS if "upload-artifact" in step.get("uses", ""))["with"]["path"].split()
    assert all((repository / path).exists() for path in kept)
    summary = summary_of(repository)
    assert summary.startswith("# model.pt: PASS: ")
    assert "\n# PASS: 3 of 3 comparisons hold\n" in summary
    suite = ElementTree.parse(repository / "junit.xml").getroot()
    assert int(suite.get("tests")) >= 8
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    assert "3 passed" in done["Compare the files as they are served"].stdout


def test_the_install_step_names_the_variable_that_is_missing(repository):
    done = run_step(RUNS["export", "Install"], repository, REPVGG_EXPORTER_GIT="")
    assert done.returncode != 0
    assert done.stderr.strip().endswith("set the repository variable REPVGG_EXPORTER_GIT")
    assert not (repository.parent / "pip.log").exists()


def test_a_checkpoint_that_cannot_be_used_fails_the_step_and_its_junit(repository):
    (repository / "model.pt").write_bytes(b"no checkpoint")
    done = run_step(RUNS["export", "Export and verify"], repository)
    assert done.returncode == 3
    root = ElementTree.parse(repository / "junit.xml").getroot()
    assert root.get("errors") == "1"
    assert root.find(".//error").get("message") == done.stderr.strip().removeprefix("error: ")
    assert run_step(RUNS["export", "Summary"], repository).returncode == 0
    assert summary_of(repository) == ""


def test_a_rejected_run_is_in_the_summary(repository):
    (repository / "exported").mkdir()
    (repository / "exported" / "report.md.rejected").write_text("# model.pt: FAIL: 1 of 2 checks hold\n")
    (repository / "here").mkdir()
    (repository / "here" / "report.md.rejected").write_text("# on the card\n")
    for job in ("export", "gpu"):
        assert run_step(RUNS[job, "Summary"], repository).returncode == 0
    assert summary_of(repository) == "# model.pt: FAIL: 1 of 2 checks hold\n# on the card\n"


def test_the_shipped_test_sees_other_weights(exported):
    """What is served was exported from another checkpoint than the one in the repository."""
    state = torch.load(exported / "model.pt", weights_only=True)
    state["linear.bias"] = state["linear.bias"] + 0.5
    torch.save(state, exported / "model.pt")
    done = run_step(RUNS["export", "Compare the files as they are served"], exported)
    assert done.returncode == 1
    assert "2 failed, 1 passed" in done.stdout
    assert "# FAIL: 1 of 3 comparisons hold" in (exported / "parity.md").read_text()


@pytest.mark.skipif(pathlib.Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_without_a_gpu_the_second_job_fails_and_does_not_skip(exported):
    verified = run_step(RUNS["gpu", "The engine that was exported, against its golden vectors"], exported)
    assert (verified.returncode, verified.stderr[:7]) == (4, "error: ")
    assert "GPU" in verified.stderr
    run = run_step(RUNS["gpu", "Export here, and run the engine"], exported)
    assert (run.returncode, run.stderr[:7]) == (4, "error: ")
    assert "GPU" in run.stderr
    assert ElementTree.parse(exported / "junit-gpu.xml").getroot().get("errors") == "1"
    assert not (exported / "here").exists()
