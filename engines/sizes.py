"""Heights and widths of images, where a graph leaves them free: smallest, usual and largest, as in 160:224:320."""

from __future__ import annotations

import re

from engines.errors import UsageError

Size = tuple[int, int]
"""(height, width) in pixels."""

Sizes = tuple[Size, Size, Size]
"""Minimum, optimum and maximum of an engine's optimization profile."""

LARGEST_SIZE = 4096


def size_and_range_from_text(text: str) -> tuple[Size, Sizes | None]:
    """What ``assumptions.size`` says: ``"224x224"``, or ``"160x160:224x224:320x320"`` where the size is free.

    Returns:
        The one size, or the optimum and all three.

    Raises:
        ValueError: it is neither, or the three are in another order.
    """
    found = [_size(part, r"(\d{1,9})x(\d{1,9})") for part in text.split(":")]
    if len(found) == 1:
        return found[0], None
    least, best, most = found
    if not is_ordered((least, best, most)):
        raise ValueError(f"{text!r} is not a minimum, optimum and maximum")
    return best, (least, best, most)


def sizes_from_text(text: str) -> Sizes:
    """``--size``: ``"160:224:320"``, each a number or HxW; one alone stands for all three.

    Raises:
        UsageError: it is neither.
    """
    try:
        found = [_size(part, r"(\d{1,9})(?:x(\d{1,9}))?") for part in text.split(":")]
        least, best, most = found * 3 if len(found) == 1 else found
    except ValueError:
        raise UsageError(f"--size: {text!r} is not MIN:OPT:MAX, each a number or HxW, as in 160:224:320") from None
    return least, best, most


def size_from_text(text: str) -> Size:
    """``--size`` where only one is taken: ``"224"`` or ``"224x320"``.

    Raises:
        UsageError: it is neither.
    """
    least, _, most = sizes_from_text(text)
    if least != most:
        raise UsageError(f"--size: {text!r} is not one size, N or HxW")
    return least


def check_sizes(sizes: Sizes) -> None:
    """Raises ``UsageError`` unless ``sizes`` are a minimum, optimum and maximum that an engine could have."""
    if not is_ordered(sizes) or max(sizes[2]) > LARGEST_SIZE:
        raise UsageError(
            f"--size: {text_of_sizes(sizes)} is not MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX <= {LARGEST_SIZE}"
        )


def is_ordered(sizes: Sizes) -> bool:
    """Whether height and width grow, or stay, from minimum to optimum to maximum."""
    return all(1 <= least <= best <= most for least, best, most in zip(*sizes, strict=True))


def text_of_sizes(sizes: Sizes) -> str:
    """As in 160x160:224x224:320x320."""
    return ":".join(map(text_of_size, sizes))


def text_of_size(size: Size) -> str:
    """As in 224x320."""
    return f"{size[0]}x{size[1]}"


def _size(text: str, form: str) -> Size:
    found = re.fullmatch(form, text, re.ASCII)
    if found is None:
        raise ValueError(f"{text!r} is no size")
    return int(found[1]), int(found[2] or found[1])
