"""A function over many items in a few threads, ahead of whoever takes the results; their order is that of the items.

For functions that let other threads run while they work, such as the decoders of images. At most ``ahead`` results wait
to be taken, so memory does not grow with the number of items.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Yields ``function(item)`` for each item; what it raises is raised here, in its turn.

    Where the iterator is closed early, what has not begun is given up, and the threads have ended when that returns.
    """
    waiting: collections.deque[Future[Result]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
