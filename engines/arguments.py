"""Text of the command line to values, where exporting and building an engine ask for the same."""

from __future__ import annotations

import re

from engines.errors import UsageError

LARGEST_BATCH = 65536


def batch_from_text(text: str) -> tuple[int, int, int]:
    """``"1:8:32"`` to (1, 8, 32); one number alone stands for all three."""
    numbers = integers_from_text("--batch", text, ":")
    if len(numbers) not in (1, 3):
        raise UsageError(f"--batch: {text!r} is not MIN:OPT:MAX, as in 1:8:32")
    return (numbers[0], numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1], numbers[2])


def check_batch(batch: tuple[int, int, int]) -> None:
    """Raises ``UsageError`` unless ``batch`` is a minimum, optimum and maximum that an engine could have."""
    if not 1 <= batch[0] <= batch[1] <= batch[2] <= LARGEST_BATCH:
        raise UsageError(
            f"--batch: {':'.join(map(str, batch))} is not MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= {LARGEST_BATCH}"
        )


def cards_from_text(text: str) -> tuple[int, ...]:
    """``"sm86,sm89"`` to (86, 89)."""
    cards = []
    for part in text.split(","):
        found = re.fullmatch(r"(?:sm_?)?(\d{2,3})", part.strip().lower(), re.ASCII)
        if found is None:
            raise UsageError(f"--gpu: {part!r} is not a compute capability; write sm86 for 8.6, several with commas")
        cards.append(int(found[1]))
    return tuple(sorted(set(cards)))


def integers_from_text(flag: str, text: str, separator: str) -> tuple[int, ...]:
    """Whole numbers of at most nine digits, for ``flag``."""
    parts = text.split(separator)
    if not all(re.fullmatch(r"\d{1,9}", part.strip(), re.ASCII) for part in parts):
        raise UsageError(f"{flag}: {text!r} is not whole numbers separated by {separator!r}")
    return tuple(int(part) for part in parts)
