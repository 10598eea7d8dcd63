"""What a check found, as values and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ochredb.catalog.facts import SetAside
from ochredb.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    place: an object's key, `catalog`, `log` (requests that lie in the catalog), or `store_id`.
    collections: full names of those that need it.
    sections: of a part, those that lie in what is damaged; empty if it cannot be told.
    derived: everything damaged can be made again from what is whole. mended: it has been.
    """

    place: str
    problem: str
    collections: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    derived: bool = False
    mended: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Of one check. size_bytes: of the objects that were read, and of the catalog.

    findings: damage. notes: what is harmless and worth knowing. quarantine: operations that could
    not be folded; no damage, and somebody should look.
    """

    store_id: str | None
    collections: int
    objects: int
    size_bytes: int
    elapsed_s: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    quarantine: tuple[SetAside, ...] = ()

    @property
    def is_damaged(self) -> bool:
        return not all(finding.mended for finding in self.findings)

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"is_damaged": self.is_damaged}

    @classmethod
    def from_document(cls, document: Any) -> Report:
        """Raises Unavailable for what is no report."""
        try:
            return cls(
                store_id=document["store_id"],
                collections=int(document["collections"]),
                objects=int(document["objects"]),
                size_bytes=int(document["size_bytes"]),
                elapsed_s=float(document["elapsed_s"]),
                findings=tuple(_finding(**row) for row in document["findings"]),
                notes=tuple(document["notes"]),
                quarantine=tuple(SetAside(**row) for row in document["quarantine"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Unavailable(f"the report of the check cannot be read: {error}") from error


def _finding(
    *,
    place: str,
    problem: str,
    collections: list[str],
    sections: list[str],
    derived: bool,
    mended: bool = False,
) -> Finding:
    return Finding(place, problem, tuple(collections), tuple(sections), derived, mended)
