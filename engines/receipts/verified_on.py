"""The README's table of the GPUs that this was verified on, made from the receipts that owners of GPUs sent.

    python -m engines.receipts.verified_on README.md        puts it between the two comments that mark its place

A receipt makes a row if a GPU ran something, nothing failed, every figure follows from its raw data, and what it ran
are engines of the network that is shipped as ``examples/fashion.pt``, by its SHA-256. A receipt in
``examples/receipts`` that does not is an error, and then the table stays as it was.
"""

from __future__ import annotations

import pathlib
import sys
import urllib.parse
from collections.abc import Iterable, Sequence

from engines.bench.contenders import ON_DEVICE
from engines.errors import ReportedError, UsageError, VerificationFailed, listed
from engines.files import sha256_of, write_whole
from engines.json_value import Malformed
from engines.markdown_text import Markup, around_markers, table
from engines.receipts.received import ReceivedExport, ReceivedReceipt, damaged, receipt_from_file
from engines.receipts.replay import checks_of_receipt

BEGIN, END = "<!-- verified-on -->", "<!-- /verified-on -->"
RECEIPTS, SHIPPED = pathlib.Path("examples/receipts"), pathlib.Path("examples/fashion.pt")
HEADER = ("GPU", "driver", "SDK", "verified, with the largest relative error", "images/s", "receipt")
NONE = "No receipt has arrived yet: nothing here is verified on any GPU.\n"
FASTEST_WAY = ON_DEVICE[-1].title


def markdown_from_receipts(receipts: Iterable[pathlib.Path], shipped: str) -> str:
    """A table with a row for each receipt, or the line that there is none.

    Args:
        receipts: files.
        shipped: SHA-256 of the network that must have been run.

    Raises:
        InputRejected: one cannot be read.
        VerificationFailed: one is of a failure, of another network, of no GPU, or not consistent.
    """
    rows = [_row(path, sound_receipt(path, shipped), shipped) for path in receipts]
    if not rows:
        return NONE
    return table(HEADER, sorted(rows)) + "\n"


def sound_receipt(path: pathlib.Path, shipped: str) -> ReceivedReceipt:
    """Reads and replays a receipt that makes a row.

    Raises:
        InputRejected, VerificationFailed: as ``markdown_from_receipts``.
    """
    receipt = receipt_from_file(path)
    try:
        problems = [f"{check.place}: {problem}" for check in checks_of_receipt(receipt) for problem in check.problems]
    except Malformed as error:
        raise damaged(path, error) from error
    if problems:
        raise VerificationFailed(f"{path}: does not follow from its own raw data: {listed(problems, 3)}; remove it")
    if not receipt.ran_on_gpu:
        raise VerificationFailed(f"{path}: no GPU ran anything, so it verifies nothing; remove it")
    if not receipt.passed:
        raise VerificationFailed(f"{path}: {receipt.verdict}: that is no verification; remove it")
    if not any(_is_of(export, shipped) for export in receipt.exports):
        raise VerificationFailed(f"{path}: none of its exports is of {SHIPPED.name}, by its SHA-256; remove it")
    return receipt


def _is_of(export: ReceivedExport, shipped: str) -> bool:
    """Whether every engine is of the shipped network, and answered."""
    return all(
        engine.answers is not None
        and engine.sidecar is not None
        and engine.sidecar.manifest.sha256["checkpoint"] == shipped
        for engine in export.engines
    )


def _row(path: pathlib.Path, receipt: ReceivedReceipt, shipped: str) -> tuple[str, ...]:
    engines = [
        (engine.sidecar.manifest, engine.figures)
        for export in receipt.exports
        if _is_of(export, shipped)
        for engine in export.engines
        if engine.sidecar is not None
    ]
    sdks = {f"{manifest.sdk['name']} {manifest.sdk['version']}" for manifest, _ in engines}
    verified = [f"{manifest.precision} {figures['relative_error']:.1e}" for manifest, figures in engines]
    return (
        f"{receipt.machine.get('gpu') or 'unnamed'} (sm{receipt.compute_capability})",
        str(receipt.machine.get("driver") or "unknown"),
        ", ".join(sorted(sdks)),
        ", ".join(verified),
        "; ".join(line for export in receipt.exports for line in _fastest(export)),
        Markup(f"[{receipt.date[:10]}]({RECEIPTS.as_posix()}/{urllib.parse.quote(path.name)})"),
    )


def _fastest(export: ReceivedExport) -> list[str]:
    """Of each file, images/s at the largest batch, as a CUDA graph without transfers."""
    if export.throughput is None:
        return []
    rows = [row for row in export.throughput.field("rows").value if row["way"] == FASTEST_WAY]
    largest = {row["file"]: row for row in sorted(rows, key=lambda row: int(row["batch"]))}
    return [
        f"{name.removesuffix('.engine')} {row['images_per_second']['value']:.0f} (batch {row['batch']})"
        for name, row in largest.items()
    ]


def with_table(readme: str, shown: str) -> str:
    """The README's text with the table ``shown`` in its place.

    Raises:
        UsageError: the comments that mark the place are not there, once each and in order.
    """
    around = around_markers(readme, BEGIN, END)
    if around is None:
        raise UsageError(f"the place of the table is not marked; put {BEGIN} and {END} there, on lines of their own")
    before, after = around
    return f"{before}{BEGIN}\n{shown}{END}{after}"


def readme_with_table(path: pathlib.Path) -> str:
    """What the README at ``path`` must say, by the receipts in the directory beside it.

    Raises:
        ReportedError: see ``markdown_from_receipts`` and ``with_table``.
    """
    receipts = sorted((path.parent / RECEIPTS).glob("*.json"))
    shown = markdown_from_receipts(receipts, sha256_of(path.parent / SHIPPED))
    return with_table(path.read_text(encoding="utf-8"), shown)


def main(arguments: Sequence[str]) -> int:
    """Writes the table into the one file that ``arguments`` name; an error is one line on standard error."""
    try:
        (path,) = map(pathlib.Path, arguments)
        write_whole(path, readme_with_table(path).encode())
    except ReportedError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
