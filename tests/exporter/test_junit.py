"""JUnit XML: what the readers of it will see, and that nothing in a report can break it."""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.errors import CheckpointRejected, CompilerRefused, InputRejected, OutputFailed, SdkMissing
from exporter.report import Check, lines_from_ledger
from exporter.report.junit import junit_from_error, junit_from_report
from tests.reports import DIGEST, PASSING, REPORT, reports

ALLOWED = {
    "testsuites": {"testsuite"},
    "testsuite": {"properties", "testcase", "system-out"},
    "properties": {"property"},
    "testcase": {"failure", "error", "skipped", "system-out"},
}
ATTRIBUTES = {
    "testsuites": {"name", "tests", "failures", "errors", "skipped", "time"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time"},
    "testcase": {"classname", "name", "time"},
    "property": {"name", "value"},
    "failure": {"message", "type"},
    "error": {"message", "type"},
    "skipped": {"message"},
}


def parsed(text):
    """The one suite of a document that has the structure that its readers expect, whatever is in it."""
    root = ElementTree.fromstring(text.encode())
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<testsuites ')
    for element in root.iter():
        assert {child.tag for child in element} <= ALLOWED.get(element.tag, set()), element.tag
        assert set(element.attrib) == ATTRIBUTES.get(element.tag, set()), element.tag
    assert [child.tag for child in root] == ["testsuite"]
    (suite,) = root
    cases = suite.findall("testcase")
    for holder in (root, suite):
        assert holder.get("tests") == str(len(cases))
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert holder.get(attribute) == str(sum(case.find(tag) is not None for case in cases))
    names = [(case.get("classname"), case.get("name")) for case in cases]
    assert len(set(names)) == len(names), "a reader keeps only one of two tests with the same name"
    assert all(len([child for child in case if child.tag != "system-out"]) <= 1 for case in cases)
    return suite


def case(suite, name):
    (found,) = [each for each in suite.findall("testcase") if each.get("name") == name]
    return found


def properties(suite):
    return {each.get("name"): each.get("value") for each in suite.iter("property")}


def test_a_check_that_held_failed_or_was_not_run_is_a_test_that_passed_failed_or_was_skipped():
    suite = parsed(junit_from_report(REPORT))
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["3", "1", "0", "1"]
    held = case(suite, "fusion, block by block")
    assert held.get("classname") == "model.fusion"
    assert [(child.tag, child.text) for child in held] == [("system-out", "1 block")]
    failed = case(suite, "fp16, graph contract")
    assert failed.get("classname") == "model.fp16"
    (failure,) = failed
    assert (failure.tag, failure.get("message"), failure.get("type")) == ("failure", "2 Conv where 3 belong", "fp16")
    assert failure.text == "fp16, graph contract: 2 Conv where 3 belong"
    (skipped,) = case(suite, "fp16, engine on this machine's GPU")
    assert (skipped.tag, skipped.get("message")) == ("skipped", "no GPU answers here")


def test_the_properties_say_what_was_compared_and_with_what():
    found = properties(parsed(junit_from_report(REPORT)))
    assert found == {
        "verdict": "FAIL: 1 of 2 checks hold, 1 not run",
        "checkpoint": "model.pt",
        "checkpoint_sha256": DIGEST,
        "inputs": "seeded noise (no --calib given)",
        "assumed_strides": "2,2",
        "assumed_eps": "1e-05",
        "assumed_size": "224x224",
        "assumed_mean": "0.5,0.5,0.5",
        "assumed_std": "1,1,1",
        "version": "0.1.0",
        "version_numpy": "2.4.6",
    }


def test_the_ledger_is_the_suites_output():
    lines = parsed(junit_from_report(REPORT)).findtext("system-out").splitlines()
    assert lines == lines_from_ledger(REPORT.ledger)
    assert [line.split("  ")[0] for line in lines] == ["ledger", "fused, float64", "fp16"]
    assert "1.5e-03" in lines[2]
    assert parsed(junit_from_report(dataclasses.replace(REPORT, ledger=()))).find("system-out") is None


def test_a_passing_report_has_no_failure():
    suite = parsed(junit_from_report(PASSING))
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["1", "0", "0", "0"]


@pytest.mark.parametrize("checks", [(), (Check("gpu", None, None, None, "none here"),)], ids=["none", "none run"])
def test_a_report_in_which_nothing_held_is_not_green(checks):
    suite = parsed(junit_from_report(dataclasses.replace(REPORT, checks=checks)))
    assert suite.get("failures") == "1"
    (failure,) = case(suite, "verdict")
    assert failure.text == "verdict: no check was run that could pass"


def test_equal_stages_stay_two_tests():
    twice = dataclasses.replace(REPORT, checks=(REPORT.checks[0], REPORT.checks[0], REPORT.checks[1]))
    suite = parsed(junit_from_report(twice))
    names = [each.get("name") for each in suite.findall("testcase")]
    assert names == ["fusion, block by block", "fusion, block by block (2)", "fp16, graph contract"]


@pytest.mark.parametrize(
    ("file", "classname"),
    [
        ("resnet.v1.pt", "resnet_v1.fusion"),
        ("model", "model.fusion"),
        ("", "checkpoint.fusion"),
        ("a b.pt", "a b.fusion"),
    ],
)
def test_the_class_has_one_dot_between_checkpoint_and_stage(file, classname):
    report = dataclasses.replace(PASSING, checkpoint={**PASSING.checkpoint, "name": file})
    assert parsed(junit_from_report(report)).find("testcase").get("classname") == classname


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointRejected("model.pt: holds no weights; give another"), 3),
        (InputRejected("x"), 3),
        (SdkMissing("TensorRT is not installed"), 4),
        (CompilerRefused("no kernel <found> & \x00 none"), 4),
        (OutputFailed("out: cannot be written"), 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_a_test_with_an_error(error, code):
    suite = parsed(junit_from_error(error, "model.pt"))
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["1", "0", "1", "0"]
    found = case(suite, "export").find("error")
    assert found.get("type") == type(error).__name__
    assert found.get("message") == str(error).replace("\x00", "\\x00")
    assert found.text == f"export: {found.get('message')}"
    assert case(suite, "export").get("classname") == "model.run"
    assert properties(suite)["exit_code"] == str(code)
    assert properties(suite)["checkpoint"] == "model.pt"


HOSTILE = "\x00\x1b[31m]]>\r\n\x0b<failure/>&amp;\ud800\udcff\ufffe\uffff\U0001f600\"'"


def test_what_xml_forbids_is_spelled_out_and_nothing_else_is_changed():
    check = Check("fp32, " + HOSTILE, passed=False, value=None, gate=None, detail=HOSTILE)
    suite = parsed(junit_from_report(dataclasses.replace(REPORT, checks=(check,))))
    seen = "\\x00\\x1b[31m]]>\\r\n\\x0b<failure/>&amp;\\ud800\\udcff\\ufffe\\uffff\U0001f600\"'"
    (found,) = suite.findall("testcase")
    assert found.get("name") == "fp32, " + seen
    assert found[0].get("message") == seen
    assert found[0].text == f"fp32, {seen}: {seen}"


@settings(max_examples=80, deadline=None)
@given(reports)
def test_any_report_makes_a_document_whose_counts_are_right(report):
    suite = parsed(junit_from_report(report))
    failed, skipped = len(report.failures), len(report.not_run)
    nothing_held = not report.passed and not failed
    assert suite.get("failures") == str(failed + nothing_held)
    assert suite.get("skipped") == str(skipped)
    assert suite.get("tests") == str(len(report.checks) + nothing_held)
    assert (suite.get("failures") == "0") is report.passed


@settings(max_examples=80, deadline=None)
@given(st.text(), st.text())
def test_any_message_and_name_make_a_document(message, name):
    suite = parsed(junit_from_error(InputRejected(message), name))
    assert suite.get("errors") == "1"
