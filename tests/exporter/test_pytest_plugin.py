"""The pytest plugin in a repository of its own: a process with nothing but a test file, as a user has it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import textwrap

import pytest

import exporter
from tests.conftest import EXAMPLES, ROOT, run_process

pytest_plugins = ["pytester"]

INSTALLED = any(point.value == "exporter.pytest_plugin" for point in importlib.metadata.entry_points(group="pytest11"))
PLUGIN = [] if INSTALLED else ["-p", "exporter.pytest_plugin"]
ALONE = [*PLUGIN, "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
ARRAYS = """
    import numpy as np
    import pytest
    from engines.parity import Gate

    A = np.array([[4.0, 1.0, -8.0], [0.0, 2.0, 1.0]])
    NEAR = A + 4e-3  # a relative error of 5e-4
    NAN = np.where(A == 4.0, np.nan, A)
    FLIPPED = np.array([[2.5, 2.6, -8.0], [0.0, 2.0, 1.0]])  # off by less than the margin, 3
"""


@pytest.fixture(autouse=True)
def _checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


@pytest.fixture
def repository(pytester):
    """Runs pytest on a test file with ``body``; the outcome, and the parity report if one was asked for."""

    def run(body, *arguments, prelude=ARRAYS):
        pytester.makepyfile(test_parity=textwrap.dedent(prelude) + textwrap.dedent(body))
        return pytester.runpytest_subprocess(*ALONE, *arguments)

    return run


def failure_of(result):
    """The lines that pytest marks as the reason."""
    return [line.removeprefix("E").strip() for line in result.outlines if line.startswith("E ")]


GATES_THAT_HOLD = ["Gate(1e-3, top1=True)", "1e-3", "1", "'fp16'"]
GATES_THAT_DO_NOT = ["Gate(1e-4, top1=True)", "1e-4", "0", "0.0", "'fp32'"]


def test_each_kind_of_gate_is_held_and_applied(repository):
    body = f"""
        @pytest.mark.parametrize("gate", [{", ".join(GATES_THAT_HOLD)}])
        def test_near(assert_parity, gate):
            found = assert_parity(A, NEAR, gate)
            assert found.passed and found.rows[0].comparison.relative_error == pytest.approx(5e-4)

        @pytest.mark.parametrize("gate", [{", ".join(GATES_THAT_DO_NOT)}])
        def test_far(assert_parity, gate):
            assert_parity(A, NEAR, gate)
    """
    result = repository(body)
    result.assert_outcomes(passed=len(GATES_THAT_HOLD), failed=len(GATES_THAT_DO_NOT))
    assert failure_of(result)[0] == (
        "Failed: ndarray (2, 3) and ndarray (2, 3) do not agree: arrays: relative error 5.00e-04 exceeds 1.0e-04; "
        "relative error 5.0e-04 (gate 1.0e-04)"
    )


WRONG = {
    "a NaN": ("assert_parity(A, NAN, 1e9)", "arrays: 1 outputs are NaN or infinite; relative error nan (gate 1.0e+09)"),
    "a flip": (
        "assert_parity(A, FLIPPED, Gate(10.0, top1=True))",
        "arrays: top-1 differs in 1 of 2 rows beyond the error's reach; relative error 2.0e-01 (gate 1.0e+01)",
    ),
    "other shapes": (
        "assert_parity(A, A[:1], 1e-3)",
        "outputs cannot be compared: shapes (2, 3) and (1, 3); give two numeric arrays (n, classes) of one shape",
    ),
    "no numbers": ("assert_parity(A, np.full((2, 3), 'x'), 1e-3)", "give two numeric arrays (n, classes) of one shape"),
    "no gate": (
        "assert_parity(A, A)",
        "assert_parity of two arrays needs a gate, and takes no inputs: it computes nothing",
    ),
    "inputs for arrays": ("assert_parity(A, A, 1e-3, inputs='x.npz')", "takes no inputs"),
    "an array and a path": ("assert_parity(A, 'x.onnx', 1e-3)", "give two of one kind"),
    "lists": ("assert_parity([[1.0]], [[1.0]], 1e-3)", "give two of one kind"),
    "an unknown precision": (
        "assert_parity(A, A, 'fp8')",
        "gate 'fp8': unknown precision; choose from fp32, fp16",
    ),
    "a gate of NaN": ("assert_parity(A, A, float('nan'))", "neither a Gate, a precision nor a largest relative error"),
    "a negative gate": ("assert_parity(A, A, -1e-3)", "neither a Gate, a precision nor a largest relative error"),
    "a gate of True": ("assert_parity(A, A, True)", "neither a Gate, a precision nor a largest relative error"),
    "a missing file": ("assert_parity('no.onnx', 'such.onnx')", "no.onnx"),
}


def test_whatever_is_wrong_is_a_failure_of_one_line(repository, pytester):
    tests = [f"    def test_{n}(assert_parity):\n        {call}\n" for n, (call, _) in enumerate(WRONG.values())]
    result = repository("".join(tests).replace("    def", "def"), "--parity-report", "parity.json")
    result.assert_outcomes(failed=len(WRONG))
    reasons = failure_of(result)
    found = json.loads((pytester.path / "parity.json").read_text())["comparisons"]
    assert len(reasons) == len(found) == len(WRONG)
    for reason, record, (call, expected) in zip(reasons, found, WRONG.values(), strict=True):
        assert reason.startswith("Failed: "), call
        assert expected in reason, call
        assert expected in record["line"], call
        assert record["passed"] is False


def test_a_failure_points_at_the_users_line_and_shows_nothing_of_the_plugin(repository):
    result = repository("def test_it(assert_parity):\n    assert_parity(A, NEAR, 1e-4, name='the engine')\n")
    text = "\n".join(result.outlines)
    assert re.search(r"^> +assert_parity\(A, NEAR, 1e-4, name='the engine'\)$", text, re.MULTILINE)
    assert re.search(r"test_parity\.py:\d+: Failed", text)
    assert "pytest_plugin.py" not in text


def test_the_report_has_every_comparison_of_the_session(repository, pytester):
    body = """
        def test_good(assert_parity):
            assert_parity(A, A, 0, name="first")
            assert_parity(A, NEAR, 1e-3)

        class TestBad:
            def test_bad(self, assert_parity):
                assert_parity(A, NAN, 1e-3, name="third")

        def test_other():
            pass
    """
    repository(body, "--parity-report", "reports/parity.json").assert_outcomes(passed=2, failed=1)
    assert [path.name for path in (pytester.path / "reports").iterdir()] == ["parity.json"]
    report = json.loads((pytester.path / "reports" / "parity.json").read_text())
    found = report.pop("comparisons")
    assert report == {"schema": 1, "passed": False, "verdict": "FAIL: 2 of 3 comparisons hold"}
    assert [(record["test"], record["name"], record["passed"]) for record in found] == [
        ("test_parity.py::test_good", "first", True),
        ("test_parity.py::test_good", "test_parity.py::test_good", True),
        ("test_parity.py::TestBad::test_bad", "third", False),
    ]
    assert [record["rows"][0]["comparison"]["max_abs_error"] for record in found] == [0.0, pytest.approx(4e-3), None]
    assert found[1]["line"] == "relative error 5.0e-04 (gate 1.0e-03)"
    assert found[0]["rows"][0]["batches"] == [2]


def test_a_report_named_md_is_markdown(repository, pytester):
    body = """
        def test_it(assert_parity):
            assert_parity(A, A, 0, name="a|b")
            assert_parity(A, NEAR, 1e-4, name="c")
    """
    repository(body, "--parity-report", "parity.md")
    assert (pytester.path / "parity.md").read_text().splitlines() == [
        "# FAIL: 1 of 2 comparisons hold",
        "",
        "## Comparisons",
        "",
        "| name | reference | candidate | result | found |",
        "| --- | --- | --- | --- | --- |",
        "| a\\|b | ndarray (2, 3) | ndarray (2, 3) | pass | relative error 0.0e+00 (gate 0.0e+00) |",
        "| c | ndarray (2, 3) | ndarray (2, 3) | **FAIL** | arrays: relative error 5.00e-04 exceeds 1.0e-04; "
        "relative error 5.0e-04 (gate 1.0e-04) |",
    ]


def test_a_report_of_no_comparison_is_no_pass(repository, pytester):
    repository("def test_it():\n    pass\n", "--parity-report", "parity.json").assert_outcomes(passed=1)
    report = json.loads((pytester.path / "parity.json").read_text())
    assert (report["passed"], report["verdict"]) == (False, "FAIL: nothing was compared")


def test_a_report_that_cannot_be_written_ends_pytest_with_one_line(repository, pytester):
    (pytester.path / "file").write_text("")
    result = repository("def test_it():\n    pass\n", "--parity-report", "file/parity.json")
    assert result.ret == 5
    assert len(result.errlines) == 1
    assert re.fullmatch(
        r"Exit: --parity-report .*/file/parity\.json: cannot be written \(.*\); give another path", result.errlines[0]
    )


SERIALIZED = """
    import json
    import pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(report):
        pass

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(item, call):
        report = yield
        config = item.config
        data = json.loads(json.dumps(config.hook.pytest_report_to_serializable(config=config, report=report)))
        return config.hook.pytest_report_from_serializable(config=config, data=data)
"""
WORKER = """
    import pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(config):
        config.workerinput = {}
"""


def test_comparisons_survive_the_way_from_a_worker_to_the_controller(repository, pytester):
    """pytest-xdist sends each test's report as plain data."""
    pytester.makeconftest(textwrap.dedent(SERIALIZED))
    repository(
        "def test_it(assert_parity):\n    assert_parity(A, NAN, 1, name='x')\n", "--parity-report", "parity.json"
    )
    (found,) = json.loads((pytester.path / "parity.json").read_text())["comparisons"]
    assert (found["name"], found["passed"]) == ("x", False)


def test_a_worker_writes_no_report(repository, pytester):
    pytester.makeconftest(textwrap.dedent(WORKER))
    repository("def test_it(assert_parity):\n    assert_parity(A, A, 0)\n", "--parity-report", "parity.json")
    assert not (pytester.path / "parity.json").exists()


# --- a repository that does not use it


def loaded_by_pytest(cwd):
    """The modules that a session with one trivial test has imported when that runs."""
    (cwd / "test_it.py").write_text("import json, sys\ndef test_it(): print(json.dumps(sorted(sys.modules)))\n")
    done = run_process(["-m", "pytest", "-s", *ALONE], cwd)
    assert done.returncode == 0, done.stdout
    return set(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("["))))


HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "onnxsim", "safetensors", "tensorrt_rtx", "tqdm"}


def test_pytest_starts_without_anything_heavy(tmp_path):
    loaded = loaded_by_pytest(tmp_path)
    assert "exporter.pytest_plugin" in loaded
    assert not {module.partition(".")[0] for module in loaded} & HEAVY
    assert {module for module in loaded if module.startswith("exporter.")} == {
        "exporter.pytest_plugin",
        "exporter.version",
    }


def test_the_check_on_imports_would_see_a_heavy_one(tmp_path):
    (tmp_path / "conftest.py").write_text("import numpy\n")
    assert "numpy" in loaded_by_pytest(tmp_path)


def test_a_repository_that_does_not_use_it_sees_nothing_of_it(pytester):
    pytester.makepyfile(test_it="def test_it(record_property, assert_parity): assert assert_parity == 'own'")
    pytester.makeconftest("import pytest\n@pytest.fixture\ndef assert_parity(): return 'own'")
    result = pytester.runpytest_subprocess(*ALONE, "-W", "error", "--strict-config")
    result.assert_outcomes(passed=1)
    assert [line for line in result.outlines if line and not line.startswith(".")] == [
        next(line for line in result.outlines if line.startswith("1 passed"))
    ]
    assert sorted(path.name for path in pytester.path.iterdir() if path.suffix != "") == ["conftest.py", "test_it.py"]


def test_help_and_fixtures_describe_it(pytester):
    pytester.runpytest_subprocess(*ALONE, "--help").stdout.fnmatch_lines(["parity:", "*--parity-report*PATH*"])
    fixtures = pytester.runpytest_subprocess(*ALONE, "--fixtures")
    fixtures.stdout.fnmatch_lines(["assert_parity*", "*A function that fails the test unless two networks*"])


# --- files


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The example's checkpoint and its files."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copy(EXAMPLES / "fashion.pt", folder)
    exporter.export(folder / "fashion.pt", folder / "fashion", size=28, trt=["fp16"])
    return folder


def test_files_are_compared_by_the_default_gate_of_their_precision(repository, pytester, exported):
    body = f"""
        import pathlib
        FOLDER = pathlib.Path({str(exported)!r})

        @pytest.mark.parametrize("name", ["fashion.onnx", "fashion.fp16.onnx"])
        def test_holds(assert_parity, name):
            found = assert_parity(FOLDER / "fashion.pt", str(FOLDER / "fashion" / name))
            assert found.rows

        def test_fp16_is_not_float32(assert_parity):
            assert_parity(FOLDER / "fashion.pt", FOLDER / "fashion" / "fashion.fp16.onnx", "fp32", name="half")
    """
    result = repository(body, "--parity-report", "parity.json")
    result.assert_outcomes(passed=2, failed=1)
    (reason,) = failure_of(result)
    assert re.search(r"fashion\.fp16\.onnx do not agree: .*: relative error \d\.\d\de-04 exceeds 5\.0e-06", reason)
    found = json.loads((pytester.path / "parity.json").read_text())["comparisons"]
    assert [record["passed"] for record in found] == [True, True, False]
    assert found[2]["rows"][-1]["comparison"]["relative_error"] > 5e-6
    assert found[0]["rows"][-1]["comparison"]["relative_error"] < 5e-6
