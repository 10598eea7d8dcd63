"""The executed plan of a read: what each step did, on how many rows, how long it took.

A read with `explain` answers with a tree of steps beside its records. The engine builds it with a
`Trace`; over HTTP it is JSON; clients and the command line show it with `tree`.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | bool | None

WIDTH = 100  # Columns of a tree.
_DETAILS_WIDTH_MIN = 24  # Details keep this much, however deep the step is.
_VALUE_LENGTH_MAX = 200  # The JSON form has the whole text.


@dataclass(slots=True)
class PlanStep:
    """One step. details: what it worked on and decided, by name; units are part of the names.

    time_us: wall time in microseconds, the inner steps' included.
    """

    operator: str
    details: dict[str, Value] = field(default_factory=dict)
    time_us: float = 0.0
    steps: list[PlanStep] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "operator": self.operator,
            "time_us": round(self.time_us, 1),
            "details": self.details,
            "steps": [step.to_json() for step in self.steps],
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> PlanStep:
        """Raises KeyError or TypeError for what `to_json` did not make."""
        return cls(
            operator=document["operator"],
            details=dict(document["details"]),
            time_us=float(document["time_us"]),
            steps=[cls.from_json(step) for step in document["steps"]],
        )

    def __str__(self) -> str:
        return tree(self)


class Trace:
    """Collects the steps of one read in one thread.

    root: its time runs from here to the end of the last step.

    with trace.step("Scan", rows=1000) as step:
        step.details["rows_out"] = 10
    """

    def __init__(self, operator: str) -> None:
        self.root = PlanStep(operator)
        self._open = [self.root]
        self._started = time.perf_counter()

    @contextmanager
    def step(self, operator: str, **details: Value) -> Iterator[PlanStep]:
        """A step inside the one that is open; its time is that of the block."""
        step = PlanStep(operator, dict(details))
        self._open[-1].steps.append(step)
        self._open.append(step)
        started = time.perf_counter()
        try:
            yield step
        finally:
            ended = time.perf_counter()
            step.time_us = (ended - started) * 1e6
            self.root.time_us = (ended - self._started) * 1e6
            self._open.pop()


def tree(step: PlanStep, width: int = WIDTH) -> str:
    """The plan as text, times on the left: a line for each step, more where details need them.

    width: columns to keep within; a narrow terminal's deepest steps may need a few more.
    """
    times = max(len(_duration(each.time_us)) for each in _all(step))
    return "\n".join(_lines(step, width, times, "", ""))


def _all(step: PlanStep) -> Iterator[PlanStep]:
    yield step
    for inner in step.steps:
        yield from _all(inner)


def _lines(step: PlanStep, width: int, times: int, first: str, rest: str) -> Iterator[str]:
    """first, rest: what the branches above draw before the step's name, and below it."""
    head = f"{first}{step.operator}"
    # Below the name, the branch to the inner steps goes on beside the details.
    below = (rest + ("│" if step.steps else "")).ljust(len(head))
    details = _wrapped(step.details, max(width - times - len(head) - 4, _DETAILS_WIDTH_MIN))
    yield f"{_duration(step.time_us):>{times}}  {head}  {details[0]}".rstrip()
    for line in details[1:]:
        yield f"{'':{times}}  {below}  {line}"
    for number, inner in enumerate(step.steps):
        last = number == len(step.steps) - 1
        branch, beside = ("└─ ", "   ") if last else ("├─ ", "│  ")
        yield from _lines(inner, width, times, rest + branch, rest + beside)


def _wrapped(details: dict[str, Value], width: int) -> list[str]:
    """Lines of `width` columns at most; a detail is cut only where it is longer than a line."""
    lines: list[str] = []
    room = 0  # Columns that are left in the last line.
    for name, value in details.items():
        item = _shown(name, value)
        if len(item) + 2 <= room:
            lines[-1] += "  " + item
            room -= len(item) + 2
        elif len(item) <= width:
            lines.append(item)
            room = width - len(item)
        else:
            lines += textwrap.wrap(item, width, subsequent_indent="  ", break_on_hyphens=False)
            room = 0  # What follows would read as part of it.
    return lines or [""]


def _shown(name: str, value: Value) -> str:
    """A detail as `name=value`, with the unit that is part of its name beside the value."""
    if isinstance(value, str):
        return f"{name}={_printable(value)}"
    number: Callable[[float], str] = _number
    for unit, with_unit in _UNITS.items():
        bare = name.removeprefix(f"{unit}_").removesuffix(f"_{unit}")
        if bare != name:
            name, number = bare, with_unit
    if isinstance(value, bool) or value is None:
        return f"{name}={str(value).lower()}"
    return f"{name}={number(value)}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _printable(text: str) -> str:
    """Cut if it is long; control characters, which could paint the terminal, in escapes."""
    if len(text) > _VALUE_LENGTH_MAX:
        text = text[:_VALUE_LENGTH_MAX] + "…"
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _size(size_bytes: float) -> str:
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    kib = size_bytes / 1024
    return f"{kib:.1f} KiB" if kib < 1024 else f"{kib / 1024:.1f} MiB"


def _duration(time_us: float) -> str:
    if time_us >= 1e6:
        return f"{time_us / 1e6:.2f} s"
    if time_us >= 1000:
        return f"{time_us / 1000:.2f} ms"
    return f"{time_us:.1f} µs" if time_us < 10 else f"{time_us:.0f} µs"


_UNITS: dict[str, Callable[[float], str]] = {"us": _duration, "bytes": _size}
