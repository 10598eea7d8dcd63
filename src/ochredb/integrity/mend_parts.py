"""Mending what a check of a running store found: parts of which only what is derived is damaged
are built anew by the store's compactor, wherever its objects are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from ochredb.errors import OchreError
from ochredb.integrity.report import Finding, Report

log = logging.getLogger("ochredb.integrity")

Rebuild = Callable[[str, Callable[[], None]], bool]
"""Writes the part of this id anew, and calls the step often, which may raise to give up. False: the
part was replaced already."""

_PARTS = "parts/"


def mended(report: Report, rebuild: Rebuild, progress: Callable[[str, int, int], None]) -> Report:
    """The report, each finding with what became of it. Nothing but parts is touched, and none that
    has lost records. progress: as of a check; it may raise to give up.
    """
    problems: dict[str, str] = {}
    for part_id in dict.fromkeys(map(_part_id, filter(_is_mendable, report.findings))):

        def step(name: str = f"mending {_PARTS}{part_id}") -> None:
            progress(name, report.size_bytes, report.size_bytes)

        step()
        try:
            rebuild(part_id, step)
        except OchreError as error:  # The others may be mended all the same (I9).
            log.warning("part %s cannot be built anew: %s", part_id, error)
            problems[part_id] = str(error)
    return replace(report, findings=tuple(_told(item, problems) for item in report.findings))


def _is_mendable(finding: Finding) -> bool:
    return finding.derived and finding.place.startswith(_PARTS)


def _part_id(finding: Finding) -> str:
    return finding.place.removeprefix(_PARTS).partition("/")[0]


def _told(finding: Finding, problems: dict[str, str]) -> Finding:
    if not _is_mendable(finding):
        return finding
    problem = problems.get(_part_id(finding))
    if problem is None:
        return replace(finding, mended=True)
    return replace(finding, problem=f"{finding.problem}; it cannot be built anew: {problem}")
