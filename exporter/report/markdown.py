"""``report.md``: the report for a person, and for a CI job's summary."""

from __future__ import annotations

from collections.abc import Iterable

from exporter.report.record import Report


def markdown_from_report(report: Report) -> str:
    """The whole report as Markdown with tables."""
    checkpoint, architecture = report.checkpoint, report.architecture
    parts = [
        f"# {checkpoint['name']}: {report.verdict}",
        f"{architecture['title']}, {checkpoint['lineage']} naming, {checkpoint['form']} form. "
        f"SHA-256 of the checkpoint: `{checkpoint['sha256']}`. Compared on {report.inputs}.",
        _section("Checks", ("stage", "result", "found"), _checks(report)),
        _section("Assumptions", ("what", "value"), report.assumptions.items()),
        _section("Engines", ("file", "made by", "cards", "audit"), _engines(report)),
        _section(
            "Fusion, block by block", ("block", "branches", "error", "as written in float32"), _certificates(report)
        ),
        _section("Files", ("file", "bytes", "SHA-256"), ((f.name, f.bytes, f"`{f.sha256}`") for f in report.files)),
        _section("Versions", ("package", "version"), report.versions.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _checks(report: Report) -> Iterable[tuple[str, str, str]]:
    return ((check.stage, "pass" if check.passed else "**FAIL**", check.detail) for check in report.checks)


def _engines(report: Report) -> Iterable[tuple[str, str, str, str]]:
    for engine in report.engines:
        cards = ", ".join(f"sm{card}" for card in engine.compute_capabilities)
        yield engine.name, f"{engine.sdk} {engine.sdk_version}", cards, str(engine.audit["line"])


def _certificates(report: Report) -> Iterable[tuple[str, str, str, str]]:
    for row in report.certificates:
        yield row["block"], " + ".join(row["branches"]), f"{row['error']:.1e}", f"{row['rounding_error']:.1e}"


def _section(title: str, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    if not cells:
        return ""
    lines = [columns, ["---"] * len(columns), *cells]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
