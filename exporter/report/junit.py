"""JUnit XML: the checks of a run as tests, for the test views of GitHub's actions, GitLab and Jenkins.

What each of them reads decides the form. GitLab groups by ``classname``, shows a failure's text and not its message,
and drops a test whose classname and name it has seen; Jenkins takes what is before the last dot of a classname for a
package, and keeps one failure of a test. So: one suite; per check one test, called by its whole stage, of the class
``<checkpoint>.<stage's head>``; the finding both as message and as text; equal names numbered. A check that could not
be run here is a skipped test. A run in which no check held fails, too.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from xml.etree import ElementTree

from exporter.errors import ReportedError
from exporter.report.record import Check, Report
from exporter.report.text import lines_from_ledger
from exporter.version import VERSION

SUITE = "repvgg-exporter"
RUN = "run"
"""The class of a test that is about the run as a whole."""
_FORBIDDEN = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_from_report(report: Report) -> str:
    """The report's checks as one suite, with versions and hashes as its properties and the ledger as its output."""
    properties = {
        "verdict": report.verdict,
        "checkpoint": report.checkpoint["name"],
        "checkpoint_sha256": report.checkpoint["sha256"],
        "inputs": report.inputs,
        **{f"assumed_{name}": value for name, value in report.assumptions.items()},
        "version": report.version,
        **{f"version_{name}": value for name, value in report.versions.items()},
    }
    cases = list(_cases(report.checks, _package(report.checkpoint["name"])))
    if not report.passed and not report.failures:
        cases.append(_case(_package(report.checkpoint["name"]), RUN, "verdict"))
        _outcome(cases[-1], "failure", "no check was run that could pass", "verdict")
    return _document(cases, properties, "\n".join(lines_from_ledger(report.ledger)) if report.ledger else "")


def junit_from_error(error: ReportedError, checkpoint: str) -> str:
    """One test that ended with an error: for a run that has no report.

    Args:
        error: what ended the run.
        checkpoint: the file name of what was to be exported.
    """
    case = _case(_package(checkpoint), RUN, "export")
    _outcome(case, "error", str(error), type(error).__name__)
    return _document([case], {"checkpoint": checkpoint, "exit_code": str(error.exit_code), "version": VERSION}, "")


def _cases(checks: Iterable[Check], package: str) -> Iterable[ElementTree.Element]:
    seen: dict[str, int] = {}
    for check in checks:
        seen[check.stage] = seen.get(check.stage, 0) + 1
        count = seen[check.stage]
        head = check.stage.partition(",")[0]
        case = _case(package, head, check.stage if count == 1 else f"{check.stage} ({count})")
        if check.passed is None:
            ElementTree.SubElement(case, "skipped", message=_clean(check.detail))
        elif check.passed:
            ElementTree.SubElement(case, "system-out").text = _clean(check.detail)
        else:
            _outcome(case, "failure", check.detail, head)
        yield case


def _case(package: str, head: str, name: str) -> ElementTree.Element:
    classname = f"{package}.{head.replace('.', '_')}"
    return ElementTree.Element("testcase", classname=_clean(classname), name=_clean(name), time="0")


def _outcome(case: ElementTree.Element, tag: str, message: str, kind: str) -> None:
    name = case.get("name", "")
    ElementTree.SubElement(case, tag, message=_clean(message), type=_clean(kind)).text = _clean(f"{name}: {message}")


def _document(cases: Sequence[ElementTree.Element], properties: Mapping[str, str], output: str) -> str:
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
        "time": "0",
    }
    root = ElementTree.Element("testsuites", {"name": SUITE, **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": SUITE, **counts})
    listed = ElementTree.SubElement(suite, "properties")
    for name, value in properties.items():
        ElementTree.SubElement(listed, "property", name=_clean(name), value=_clean(value))
    suite.extend(cases)
    if output:
        ElementTree.SubElement(suite, "system-out").text = _clean(output)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _package(checkpoint: str) -> str:
    """The checkpoint's stem, in which a dot would be read as another level."""
    return pathlib.PurePath(checkpoint).stem.replace(".", "_") or "checkpoint"


def _clean(text: str) -> str:
    """Text that XML can hold: what it forbids, even as a reference, is spelled out."""
    return _FORBIDDEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)
