"""Recorded expressions and the texts of statements that come with the package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy.dialects import sqlite

from ochredb.catalog import core, statement
from ochredb.catalog.core import digest, real
from ochredb.catalog.schema import fragments, logs, metadata
from ochredb.catalog.statement import TEXTS_PATH, Statement


def test_the_texts_of_the_package_are_those_of_its_statements() -> None:
    """If this fails: `python -m ochredb.catalog.statement`."""
    code = "from ochredb.catalog import statement; print(statement.all_texts().decode(), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == TEXTS_PATH.read_bytes()


def test_no_statement_of_the_catalog_needs_sqlalchemy() -> None:
    code = (
        "import sys, importlib, pkgutil, ochredb.catalog as c\n"
        "for m in pkgutil.iter_modules(c.__path__, 'ochredb.catalog.'):\n"
        "    m.ispkg or importlib.import_module(m.name)\n"
        "from ochredb.catalog import statement\n"
        "texts = [each.compiled('sqlite')[0] for each in statement._statements]\n"
        "print(len(texts) > 50, 'sqlalchemy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def tables() -> dict[str, sqlalchemy.Table]:
    return {table.name: table for table in metadata.sorted_tables}


@pytest.mark.parametrize(
    ("recorded", "direct"),
    [
        (
            lambda: (
                core.select(logs.c.version, core.func.count())
                .where((logs.c.version > 1) | ~(logs.c.state == "live"), logs.c.dimension <= 3)
                .order_by(logs.c.version)
                .limit(core.bindparam("n"))
            ),
            lambda t: (
                sqlalchemy.select(t["logs"].c.version, sqlalchemy.func.count())
                .where(
                    (t["logs"].c.version > 1) | ~(t["logs"].c.state == "live"),
                    t["logs"].c.dimension <= 3,
                )
                .order_by(t["logs"].c.version)
                .limit(sqlalchemy.bindparam("n"))
            ),
        ),
        (
            lambda: core.update(logs).values(version=logs.c.version + 1, state=None),
            lambda t: sqlalchemy.update(t["logs"]).values(
                version=t["logs"].c.version + 1, state=None
            ),
        ),
        (
            lambda: core.upsert(fragments).on_conflict_do_nothing(index_elements=["start"]),
            lambda t: sqlite.insert(t["fragments"]).on_conflict_do_nothing(
                index_elements=["start"]
            ),
        ),
    ],
)
def test_what_was_recorded_is_what_is_compiled(
    recorded: Callable[[], Any], direct: Callable[[Any], Any]
) -> None:
    expected = direct(tables()).compile(dialect=sqlite.dialect(paramstyle="named"))
    text, literals = Statement(recorded()).compiled("sqlite")
    assert text == str(expected)
    given = {name: value for name, value in expected.params.items() if value is not None}
    assert {name: value for name, value in literals.items() if value is not None} == given


def test_recorded_and_real_expressions_mix() -> None:
    mixed = sqlalchemy.select(logs.c.version).where(logs.c.state == "live")
    assert "FROM logs" in str(mixed)


def test_digests_tell_expressions_apart() -> None:
    def table(*columns: str) -> Any:
        made = [core.Column(name, core.Text) for name in columns]
        return core.Table("t", core.MetaData(), *made)

    def digests(*values: Any) -> list[str]:
        return [digest(value) for value in values]

    same = digests(core.insert(table("a")), core.insert(table("a")))
    assert same[0] == same[1]
    changed = digests(
        core.insert(table("a")),
        core.insert(table("a", "b")),
        core.insert(table("b")),
        core.update(table("a")),
        logs.c.version == 1,
        logs.c.version == "1",
        logs.c.version == 2,
        logs.c.version != 1,
        core.select(logs.c.version).limit(1),
        core.select(logs.c.version).offset(1),
    )
    assert len(set(changed)) == len(changed)


def test_a_statement_that_is_not_among_the_texts_is_compiled() -> None:
    new = Statement(core.select(logs.c.version).where(logs.c.collection == "x").limit(17))
    assert digest(new.element) not in statement._shipped()["sqlite"]
    text, literals = new.compiled("sqlite")
    assert "LIMIT" in text
    assert {"x", 17} <= set(literals.values())


def test_a_recorded_expression_has_no_truth_value() -> None:
    with pytest.raises(TypeError, match="truth"):
        bool(logs.c.version == 1)


def test_a_table_is_made_once() -> None:
    assert real(logs) is real(logs)
    assert real(logs) is tables()["logs"]
