"""The README: its commands run, its transcript is what they print, its tables say what the code has."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from exporter.cli import main
from exporter.lineages import LINEAGES
from exporter.report import Report
from exporter.request import PRECISION_NAMES
from exporter.variants import VARIANTS
from exporter.version import VERSION
from tests.conftest import EXAMPLES, ROOT, run_process

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL_LINES = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
EXPORTS = [line.removeprefix("python ").split() for line in SHELL_LINES if line.startswith("python -m exporter")]
INSTALLS = [line.removeprefix("pip install ").strip("'") for line in SHELL_LINES if line.startswith("pip install ")]


def numbers_hidden(text):
    """Errors differ in the last digits from one processor to the next; everything else must not."""
    return re.sub(r"\d\.\de-\d+|\d+\.\d dB| in stage\d\.\d+", "#", text)


@pytest.fixture
def here(tmp_path, monkeypatch):
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_shell_line_is_one_that_a_test_runs():
    assert len(EXPORTS) + len(INSTALLS) == len([line for line in SHELL_LINES if line])
    assert len(EXPORTS) >= 5
    assert len(INSTALLS) == 2


@pytest.mark.parametrize("arguments", EXPORTS, ids=" ".join)
def test_every_export_command_runs(arguments, here):
    done = run_process(arguments, here)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_transcript_is_what_the_command_prints(here):
    command, transcript = re.search(r"\$ python -m exporter (.*?)\n(.*?)```", README, re.DOTALL).groups()
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert main(command.split()) == 0
    assert numbers_hidden(stdout.getvalue()) == numbers_hidden(transcript)


def test_the_python_example_runs(here):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    done = run_process(["-c", code], here)
    assert done.stdout == (
        "PASS: 8 of 8 checks hold 11 of 11 convs in FP16, Conv+ReLU in one kernel each, all 12 weights bit-equal\n"
    )
    assert issubclass(Report, object)


@pytest.mark.slow
@pytest.mark.parametrize("target", INSTALLS)
def test_every_install_command_resolves(target):
    arguments = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "-c", "constraints.txt", target]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = README.split("| extra | brings | for |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z-]+)`", re.sub(r"\|[^|]*\|[^|]*\|\n", "|\n", table))) == set(
        project["optional-dependencies"]
    )
    assert project["dependencies"] == ["numpy>=1.26,<3"]


def test_what_is_recognised_is_what_the_tuples_hold():
    section = README.split("## What is recognised")[1].split("##")[0]
    assert all(lineage.name in section for lineage in LINEAGES)
    assert re.search(r"\| precisions \| (.*) \|", section)[1] == ", ".join(f"`{name}`" for name in PRECISION_NAMES)
    assert {VARIANTS[0].name, "B3", VARIANTS[-1].name} <= set(re.findall(r"\b[ABD]\d(?:se)?\b", section))


def test_ci_runs_the_readmes_test_command():
    assert "    make test " in README
    commands = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith(("#", "set", "cd"))
    ]
    assert commands == ["make test"]


def test_the_changelog_has_this_version():
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()
