"""Parsing JSON of which a failure means something: a wrong request, a damaged file."""

from __future__ import annotations

from typing import Any

import orjson


def loads(text: bytes | str | memoryview) -> Any:
    """Raises orjson.JSONDecodeError; MemoryError, which orjson also tells as one of those."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if error.msg.startswith("Not enough memory"):
            raise MemoryError(error.msg) from error
        raise
