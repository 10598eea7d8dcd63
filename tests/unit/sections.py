"""Sections as a part would give them back, for tests of what lies in them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ochredb.parts.arrays import Section, SectionSource


def section_source(sections: Mapping[str, Section]) -> SectionSource:
    """Reads from a dict as from a part's container."""

    def section(name: str) -> memoryview | None:
        data = sections.get(name)
        if data is None:
            return None
        return data.data if isinstance(data, np.ndarray) else memoryview(data)

    return section


def as_bytes(sections: Mapping[str, Section]) -> dict[str, bytes]:
    return {name: bytes(data) for name, data in sections.items()}
