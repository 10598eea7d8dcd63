"""docs/operations.md has every setting as it is."""

from __future__ import annotations

from pathlib import Path

from ochredb_node.cli_config import reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def test_the_page_has_the_table_of_settings() -> None:
    """Rewrite the table with what `ochredb config --reference` prints."""
    assert reference() in PAGE.read_text(encoding="utf-8")
