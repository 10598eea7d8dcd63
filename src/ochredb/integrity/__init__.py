"""Whether a store is whole: every byte against its checksum, every fact against the others.

    from ochredb.integrity import check

    report = check("./data")                        # or "http://127.0.0.1:8000"
    report.is_damaged, report.findings

`check` verifies a store that goes on working; `report` is what it found. What can be mended is
mended by the compactor's role (`ochredb repair`).
"""

from ochredb.integrity.check import check, check_store
from ochredb.integrity.report import Finding, Report

__all__ = ["Finding", "Report", "check", "check_store"]
