"""Arrays as text in JSON and back, bit for bit: a dtype, a shape, and base64 of the numbers in little-endian order.

Reading believes no length: the shape says how much may come out, within MOST_NUMBERS, and what came out is counted.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.json_value import Value

MOST_NUMBERS = 1 << 24
"""Of one array: far more than any network answers for a few images."""


def packed_array(array: NDArray[Any]) -> dict[str, Any]:
    """``{"dtype", "shape", "base64"}`` of an array of floats."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    text = base64.b64encode(little.tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": text}


def unpacked_array(value: Value, dtype: str) -> NDArray[Any]:
    """The array that ``packed_array`` was given; it may hold NaN.

    Args:
        value: the object.
        dtype: that it must have.

    Raises:
        Malformed: it is not such an object, or the text is damaged, or too long, or not as long as the shape says.
    """
    fields = value.fields("dtype", "shape", "base64")
    fields["dtype"].one_of([dtype])
    shape = fields["shape"].whole_numbers(least=1)
    count, size = math.prod(shape), np.dtype(dtype).itemsize
    if not shape or count > MOST_NUMBERS:
        raise fields["shape"].wrong(f"a shape of at most {MOST_NUMBERS} numbers")
    text = fields["base64"]
    if not isinstance(text.value, str) or len(text.value) != 4 * -(-count * size // 3):
        raise text.wrong(f"base64 of {count * size} bytes, as the shape says")
    try:
        content = base64.b64decode(text.value, validate=True)
    except ValueError as error:  # binascii's own is one
        raise text.wrong("base64") from error
    if len(content) != count * size:
        raise text.wrong(f"base64 of {count * size} bytes, as the shape says")
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(dtype)
