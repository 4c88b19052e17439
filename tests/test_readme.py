"""The README: its commands run, its transcript is what they print, its tables say what the code has."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from exporter.cli import main
from exporter.lineages import LINEAGES
from exporter.request import PRECISION_NAMES
from exporter.variants import VARIANTS
from exporter.version import VERSION
from tests.conftest import EXAMPLES, ROOT, run_process

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL_LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line
]
COMMANDS = [shlex.split(line.removeprefix("python ")) for line in SHELL_LINES if line.startswith("python ")]
INSTALLS = [shlex.split(line)[2:] for line in SHELL_LINES if line.startswith("pip install ")]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NO_GPU = 4


def numbers_hidden(text):
    """Errors differ in the last digits from one processor to the next; everything else must not."""
    text = re.sub(r"\d\.\de-\d+|\d+\.\d dB|(?<=  )\d+\.\d(?=  )| in stage\d\.\d+", "#", text)
    return re.sub(r" +", " ", text)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with the examples, in which one command finds what those before it wrote."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(EXAMPLES, folder / "examples")
    return folder


def test_every_shell_line_is_one_that_a_test_runs():
    assert len(COMMANDS) + len(INSTALLS) == len(SHELL_LINES)
    assert {tuple(command[:2]) for command in COMMANDS if command[0] == "-m"} == {
        ("-m", "exporter"), ("-m", "exporter.verify"), ("-m", "engines"),
    }  # fmt: skip
    assert len(COMMANDS) >= 15
    assert len(INSTALLS) == 4


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_runs_after_those_before_it(command, here):
    done = run_process(command, here)
    if command == ["-m", "engines", "verify", "fashion"]:
        assert done.returncode == NO_GPU
        assert "was not run: no GPU answers here; --static is content with what needs no GPU" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")


def test_the_transcript_is_what_the_command_prints(here, monkeypatch):
    monkeypatch.chdir(here)
    command, transcript = re.search(r"\$ python -m exporter (.*?)\n(.*?)```", README, re.DOTALL).groups()
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert main(command.split()) == 0
    assert numbers_hidden(stdout.getvalue()) == numbers_hidden(transcript)


PRELUDES = (
    ("exporter.export", ""),
    ("np.savez", "import numpy as np, torch; model = torch.nn.Flatten(); images = torch.ones(2, 3, 4, 4)"),
    ("engines.load", ""),
)
PRINTED = (
    "PASS: 8 of 8 checks hold, 1 not run 11 of 11 convs in FP16, Conv+ReLU in one kernel each, "
    "all 12 weights bit-equal",
    "",
    "TensorDescription(name='input', dtype='float32', shape=(None, 1, 28, 28)) (3, 10)",
)


@pytest.mark.parametrize("index", range(len(PYTHON)))
def test_every_python_example_runs(index, here):
    needle, prelude = PRELUDES[index]
    assert needle in PYTHON[index]
    done = run_process(["-c", f"{prelude}\n{PYTHON[index]}"], here)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == PRINTED[index]


def test_the_file_of_expected_answers_is_one_that_the_snippet_makes(here):
    with np.load(here / "io.npz") as archive:
        assert archive["input"].shape == (2, 3, 4, 4)
        assert archive["output"].shape == (2, 48)


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in INSTALLS if "-c" not in target], ids=" ".join)
def test_every_install_command_resolves(target):
    arguments = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "-c", "constraints.txt", *target]
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
    assert {VARIANTS[0].name, "B3", VARIANTS[-1].name} <= set(re.findall(r"\b[ABDS]\d(?:se)?\b", section))


def test_ci_runs_the_readmes_test_command():
    assert "    make test " in README
    commands = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith(("#", "set", "cd"))
    ]
    assert commands == ["make test"]


def test_the_changelog_has_this_version():
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()
