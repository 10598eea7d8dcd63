"""A literal that every match of a regular expression contains, to look up in a text index."""

from __future__ import annotations

import re

_REPETITION = re.compile(r"[*?]|\{[0-9]+(,[0-9]*)?\}")
# Escapes that stand for a set of characters or for a place, without an argument.
_CLASS_ESCAPES = frozenset("dDsSwWbBAz")
_LITERAL_BYTES_MIN = 3


class _Unsure(Exception):
    """The pattern uses something that this module does not follow."""


def literal_of(pattern: str) -> bytes | None:
    """The longest literal (UTF-8) of the pattern's top level; None if there is none of 3 bytes.

    Conservative: groups are skipped, and alternation, flags such as `(?i)` and rare escapes give
    None. For a pattern that RE2 accepts, whatever matches contains the literal.
    """
    try:
        runs = _runs(pattern)
    except (_Unsure, IndexError):  # IndexError: the pattern ends too early; RE2 refuses it.
        return None
    longest = max((run.encode("utf-8", "surrogatepass") for run in runs), key=len, default=b"")
    return longest if len(longest) >= _LITERAL_BYTES_MIN else None


def _runs(pattern: str) -> list[str]:
    """Literal runs of the top level, in order."""
    runs = [""]
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "|":
            raise _Unsure
        if char == "(":
            at = _after_group(pattern, at)
            runs.append("")
        elif char == "[":
            at = _after_class(pattern, at)
            runs.append("")
        elif char in "*?{":
            # The item before may occur no times.
            runs[-1] = runs[-1][:-1]
            runs.append("")
            repetition = _REPETITION.match(pattern, at)
            if repetition is None:
                raise _Unsure
            at = repetition.end()
        elif char in "+.^$":
            runs.append("")
            at += 1
        elif char == "\\":
            escaped = pattern[at + 1]
            if escaped in _CLASS_ESCAPES:
                runs.append("")
            elif escaped.isalnum() or not escaped.isascii():
                raise _Unsure
            else:
                runs[-1] += escaped
            at += 2
        else:
            runs[-1] += char
            at += 1
    return runs


def _after_group(pattern: str, at: int) -> int:
    """The position after the group that opens at `at`."""
    depth = 0
    while True:
        char = pattern[at]
        if char == "[":
            at = _after_class(pattern, at)
            continue
        if char == "\\":
            if pattern[at + 1] in "QE":
                raise _Unsure
            at += 2
            continue
        if char == "(":
            depth += 1
            # "(?:", "(?P<name>" and "(?<name>" group; anything else sets flags.
            if pattern[at + 1] == "?" and pattern[at + 2] not in ":P<":
                raise _Unsure
        elif char == ")":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1


def _after_class(pattern: str, at: int) -> int:
    """The position after the character class that opens at `at`."""
    at += 1
    if pattern[at] == "^":
        at += 1
    if pattern[at] == "]":  # First, it is a literal.
        at += 1
    while pattern[at] != "]":
        if pattern[at] == "[" and pattern[at + 1] == ":":
            at = pattern.index(":]", at) + 2 if ":]" in pattern[at:] else at + 1
        elif pattern[at] == "\\":
            if pattern[at + 1] in "QE":
                raise _Unsure
            at += 2
        else:
            at += 1
    return at + 1
