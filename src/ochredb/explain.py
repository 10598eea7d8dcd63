"""The executed plan of a read: what each step did, on how many rows, how long it took.

A read with `explain` answers with a tree of steps beside its records. The engine builds it with a
`Trace`; over HTTP it is JSON; clients and the command line show it with `tree`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | bool | None


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


class Trace:
    """Collects the steps of one read in one thread.

    with trace.step("Scan", rows=1000) as step:
        step.details["rows_out"] = 10
    """

    def __init__(self, operator: str) -> None:
        self.root = PlanStep(operator)
        self._open = [self.root]

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
            step.time_us = (time.perf_counter() - started) * 1e6
            self._open.pop()


def tree(step: PlanStep) -> str:
    """The plan as indented text, a line for each step."""
    return "\n".join(_lines(step, "", ""))


def _lines(step: PlanStep, first: str, rest: str) -> Iterator[str]:
    details = ", ".join(f"{name}={_shown(value)}" for name, value in step.details.items())
    yield f"{first}{step.operator}  {details}  [{_duration(step.time_us)}]"
    for number, inner in enumerate(step.steps):
        last = number == len(step.steps) - 1
        yield from _lines(
            inner, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  ")
        )


def _shown(value: Value) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(time_us: float) -> str:
    return f"{time_us / 1000:.2f} ms" if time_us >= 1000 else f"{time_us:.0f} µs"
