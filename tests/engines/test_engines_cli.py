"""``python -m engines`` as a person meets it: help, one line for every error, and an exit code that says which kind."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from engines import errors
from engines.cli import COMMANDS, main
from engines.commands import verify
from engines.interrupts import Interrupts
from engines.version import VERSION
from exporter.version import VERSION as EXPORTER_VERSION
from tests.conftest import EXAMPLES, ROOT, run_process


def test_help_names_every_command_and_exit_code(tmp_path):
    done = run_process(["-m", "engines", "--help"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in (*COMMANDS, "130", "a check failed", "model.fp16.engine cat.jpg"):
        assert word in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_own_help(engines_command, command, capsys):
    with pytest.raises(SystemExit) as caught:
        engines_command(command, "--help")
    assert caught.value.code == 0


def test_the_flag_that_runs_an_unverified_plan_says_what_it_means(tmp_path):
    done = run_process(["-m", "engines", "run", "--help"], tmp_path)
    said = " ".join(done.stdout.split())
    assert "--allow-unverified load an engine without a sidecar or with another SHA-256: a plan is native code" in said
    assert "deserializing one is running it" in said


def test_the_version_is_the_exporters(tmp_path):
    assert run_process(["-m", "engines", "--version"], tmp_path).stdout == f"repvgg-exporter {VERSION}\n"
    assert VERSION == EXPORTER_VERSION


def test_the_help_and_the_package_load_no_numpy(tmp_path):
    script = """
        import sys
        import engines
        assert callable(engines.build), engines.build
        try:
            __import__("engines.cli").cli.main(["--help"])
        except SystemExit:
            pass
        sys.exit("numpy" in sys.modules)
    """
    assert run_process(["-c", textwrap.dedent(script)], tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: COMMAND; see python -m engines --help"),
        (["export"], "argument COMMAND: invalid choice: 'export'"),
        (["verify"], "the following arguments are required: DIR|FILE; see python -m engines verify --help"),
        (["verify", "x", "--stat"], "unrecognized arguments: --stat"),
        (["verify", "x", "--device", "one"], "argument --device: invalid int value: 'one'"),
        (["verify", "x", "--require", "gpu"], "argument --require: invalid choice: 'gpu'"),
        (["run", "x.onnx"], "the following arguments are required: IMAGE; see python -m engines run --help"),
    ],
)
def test_a_wrong_call_is_one_line_and_2(engines_command, arguments, said):
    outcome = engines_command(*arguments)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.error.startswith(said)


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ReportedError)]
CODES = {
    "ReportedError": 1,
    "VerificationFailed": 1,
    "UsageError": 2,
    "InputRejected": 3,
    "SdkMissing": 4,
    "CompilerRefused": 4,
    "DeviceFailed": 4,
    "OutputFailed": 5,
}


def raising(error):
    def run(*_):
        raise error

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_every_reported_error_is_one_line_with_its_code(engines_command, monkeypatch, kind):
    monkeypatch.setattr(verify, "run", raising(kind("what\nand where")))
    outcome = engines_command("verify", "x")
    assert (outcome.code, outcome.error) == (CODES[kind.__name__], "what and where")


def test_a_name_cannot_act_on_the_terminal(engines_command, monkeypatch):
    monkeypatch.setattr(verify, "run", raising(errors.InputRejected("a\x1b[2Jb: no such file; ü stays")))
    assert engines_command("verify", "x").error == r"a\x1b[2Jb: no such file; ü stays"


def test_a_standard_output_that_is_closed_is_no_defect(fashion_export):
    command = f"{shlex.quote(sys.executable)} -m engines verify {shlex.quote(str(fashion_export))} --static >&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_that_an_import_took_for_a_missing_package_is_an_interruption(monkeypatch):
    def interrupted(*_):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        raise errors.SdkMissing("ONNX Runtime is not installed here")

    monkeypatch.setattr(verify, "run", interrupted)
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert main(["verify", "x"]) == 130
    assert stderr.getvalue() == "error: interrupted; nothing was written\n"


def test_running_out_of_memory_is_3_and_an_interrupt_130(engines_command, monkeypatch):
    monkeypatch.setattr(verify, "run", raising(MemoryError("4 GB")))
    assert engines_command("verify", "x").error == "out of memory (4 GB); free memory on this machine"
    monkeypatch.setattr(verify, "run", raising(KeyboardInterrupt()))
    outcome = engines_command("verify", "x")
    assert (outcome.code, outcome.error) == (130, "interrupted; nothing was written")


def test_a_path_that_cannot_be_looked_at_is_3(engines_command, monkeypatch):
    monkeypatch.setattr(verify, "run", raising(PermissionError(13, "Permission denied", "model/report.json")))
    outcome = engines_command("verify", "x")
    assert (outcome.code, outcome.error) == (3, "model/report.json: Permission denied; check its permissions")


def test_a_defect_keeps_its_traceback(engines_command, monkeypatch):
    monkeypatch.setattr(verify, "run", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        engines_command("verify", "x")


def test_debug_shows_the_traceback_and_the_line(engines_command):
    outcome = engines_command("verify", "missing", "--debug")
    assert outcome.code == 3
    assert "Traceback" in outcome.stderr
    assert outcome.stderr.splitlines()[-1] == "error: missing: no such file or directory; check the path"


def test_output_that_cannot_be_written_is_5(fashion_export):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "engines", "verify", str(fashion_export), "--static"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr == "error: standard output: cannot be written ([Errno 28] No space left on device)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_one_line_and_130(number):
    script = """
        import sys, time
        from engines import cli
        from engines.commands import verify

        def wait(*_):
            print("waiting", flush=True)
            time.sleep(60)

        verify.run = wait
        sys.argv = ["engines", "verify", "x"]
        sys.exit(cli.main())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "error: interrupted; nothing was written\n")


WRITING = {
    "golden": ("golden fashion", ["fashion/golden.bin"]),
    "run": (f"run fashion/fashion.onnx {EXAMPLES / 'ankle_boot.png'} --save out.npz", ["out.npz"]),
    "build": ("build fashion/fashion.fp16.onnx --out b.engine --gpu sm86", ["b.engine", "b.engine.json"]),
    "bench": (
        "bench fashion/fashion.onnx --batch 1 --duration 0.01 --report fashion",
        [f"fashion/{name}" for name in ("bench.json", "bench.svg", "report.md")],
    ),
    "receipt": ("receipt fashion --allow-no-gpu --out r.json", ["r.json"]),
}


@pytest.mark.parametrize("heeded", [False, True], ids=["", "heeded all the same"])
@pytest.mark.parametrize("command", WRITING)
def test_what_is_written_is_never_called_unwritten(engines_command, fashion, tmp_path, monkeypatch, command, heeded):
    """A signal comes as the first file gets its name; ``heeded`` shows what would be said if it were not too late."""
    line, names = WRITING[command]
    (fashion / "report.md").unlink()
    replace = pathlib.Path.replace

    def interrupted(self, target):
        replace(self, target)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pathlib.Path, "replace", interrupted)
    if heeded:
        monkeypatch.setattr(Interrupts, "too_late", lambda self: None)
    outcome = engines_command(*line.split())
    if heeded:
        assert (outcome.code, outcome.error) == (130, "interrupted; nothing was written")
    else:
        assert (outcome.code, outcome.stderr) == (0, "")
        assert [name for name in names if not (tmp_path / name).is_file()] == []
