"""Stores of every format version, put together again; and what the next release would be like."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

from ochredb.catalog import migrate, schema

HERE = Path(__file__).parent
VERSIONS = sorted(path.name for path in HERE.glob("v*") if path.is_dir())


def rebuild(version: str, target: Path) -> None:
    """A store of `version` in the new or empty directory `target`."""
    golden = HERE / version
    target.mkdir(exist_ok=True)
    connection = sqlite3.connect(target / "ochredb.sqlite3")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.executescript((golden / "catalog-dump.txt").read_text(encoding="utf-8"))
    connection.close()
    shutil.copytree(golden / "objects", target / "objects")


def become_next_release(scratch: Path) -> int:
    """From now on this process's migrations go one step further; returns that format version.

    scratch: a new directory, for the steps.
    """
    version = schema.FORMAT_VERSION + 1
    shutil.copytree(migrate.STEPS, scratch)
    (scratch / "versions" / "9999_next.py").write_text(
        "from alembic import op\n"
        "import sqlalchemy as sa\n"
        f'revision, down_revision = "9999", "{_head()}"\n'
        "def upgrade():\n"
        '    op.create_table("next", sa.Column("id", sa.Text, primary_key=True))\n'
        f'    op.execute("UPDATE store SET format_version = {version}")\n'
    )
    migrate.STEPS = scratch
    migrate.FORMAT_VERSION = version  # type: ignore[attr-defined]
    return version


def _head() -> str:
    files = sorted(path.name for path in (migrate.STEPS / "versions").glob("[0-9]*.py"))
    return files[-1].partition("_")[0]
