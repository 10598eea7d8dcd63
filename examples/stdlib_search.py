"""Search Python's standard library by what its docstrings say.

    python examples/stdlib_search.py

Reads some thousand docstrings from the sources of the Python that runs it, stores them in an
embedded database in a temporary directory, and searches them: by text, by metadata, by both. Needs
no network and no model, takes some seconds, and leaves nothing behind.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import ochredb
from ochredb.embedding_functions import LexicalEmbeddingFunction

BATCH_SIZE = 250
RESULTS = 5
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
NOT_FOR_USERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages"}

# A file or a pipe has no width of its own.
console = Console() if sys.stdout.isatty() else Console(width=100)


@dataclass(frozen=True)
class Docstring:
    """What one module, class or function says about itself."""

    name: str  # Such as "tempfile.NamedTemporaryFile".
    text: str
    metadata: dict[str, Any]


def main() -> None:
    started = time.perf_counter()
    console.print(
        Panel(
            "Every public docstring of the standard library of "
            f"[bold]Python {sys.version.split()[0]}[/bold], in an embedded OchreDB.\n"
            "The vectors come from the built-in function, which compares words, not meanings.",
            title="[bold]OchreDB[/bold]",
            border_style="yellow",
        )
    )
    with tempfile.TemporaryDirectory(prefix="ochredb-demo-") as directory:
        client = ochredb.PersistentClient(directory)
        collection = client.create_collection(
            "stdlib", embedding_function=LexicalEmbeddingFunction()
        )
        store(collection, read_docstrings())
        search(collection)
        look_up_and_update(collection)
        client.close()
        reopen(directory)
    elapsed_s = time.perf_counter() - started
    console.print(f"\nDone in {elapsed_s:.1f} s; the temporary directory is deleted again.")


# ---------------------------------------------------------------------------------- storing


def store(collection: ochredb.Collection, docstrings: Sequence[Docstring]) -> None:
    """Embed and add all docstrings, batch by batch, and say how long each took."""
    embed = LexicalEmbeddingFunction()
    embedding_s = storing_s = 0.0
    with progress_bars() as progress:
        task = progress.add_task("Embedding and storing", total=len(docstrings))
        for start in range(0, len(docstrings), BATCH_SIZE):
            batch = docstrings[start : start + BATCH_SIZE]
            before = time.perf_counter()
            embeddings = embed([docstring.text for docstring in batch])
            between = time.perf_counter()
            collection.add(
                ids=[docstring.name for docstring in batch],
                embeddings=embeddings,
                documents=[docstring.text for docstring in batch],
                metadatas=[docstring.metadata for docstring in batch],
            )
            embedding_s += between - before
            storing_s += time.perf_counter() - between
            progress.advance(task, len(batch))
    console.print(
        f"[bold]{collection.count():,}[/bold] records: {embedding_s:.1f} s to embed, "
        f"[bold]{storing_s:.1f} s to store[/bold] durably "
        f"({len(docstrings) / storing_s:,.0f} records a second)."
    )


def read_docstrings() -> list[Docstring]:
    """All public docstrings, from sources: nothing is imported, so nothing is run."""
    files = list(source_files())
    found: dict[str, Docstring] = {}
    with progress_bars() as progress:
        task = progress.add_task("Reading sources", total=len(files))
        for module, file in files:
            for docstring in docstrings_of(module, ast.parse(file.read_bytes())):
                found.setdefault(docstring.name, docstring)  # A property's setter has its name.
            progress.advance(task)
    if not found:
        sys.exit("This Python has no sources of its standard library to read.")
    return list(found.values())


def source_files() -> Iterator[tuple[str, Path]]:
    """Name and file of each public module written in Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        single = root / f"{name}.py"
        files = [single] if single.exists() else sorted((root / name).rglob("*.py"))
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if not any(part.startswith("_") or part in NOT_FOR_USERS for part in parts):
                yield ".".join(parts), file


def docstrings_of(module: str, tree: ast.Module) -> Iterator[Docstring]:
    """The docstrings of a module, its classes, functions and methods, unless private."""
    pending: list[tuple[str, ast.Module | ast.ClassDef]] = [(module, tree)]
    while pending:
        name, scope = pending.pop()
        yield from describe(module, name, scope)
        for node in scope.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                pending.append((f"{name}.{node.name}", node))
            elif isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
                yield from describe(module, f"{name}.{node.name}", node)


def describe(
    module: str,
    name: str,
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[Docstring]:
    text = ast.get_docstring(node)
    if not text:
        return
    kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
    arguments = ast.unparse(node.args) if hasattr(node, "args") else ""
    metadata = {
        "module": module,
        "kind": kind,
        "lines": len(text.splitlines()),
        "length": len(text),
        "has_args": arguments not in ("", "self", "cls"),
    }
    yield Docstring(name, f"{name}: {text}", metadata)


# -------------------------------------------------------------------------------- searching


def search(collection: ochredb.Collection) -> None:
    """Queries by text alone, with a metadata filter, and with full-text filters."""
    console.rule("[bold]Search by text[/bold]")
    for text in (
        "open a temporary file that deletes itself",
        "copy a directory tree recursively",
        "wait until a thread terminates",
    ):
        query(collection, text)

    console.rule("[bold]... and by metadata[/bold]")
    query(collection, "queue", where={"kind": "class"})
    query(
        collection,
        "random number",
        where={"$and": [{"kind": "function"}, {"has_args": True}, {"lines": {"$lte": 2}}]},
    )

    console.rule("[bold]... and by full text[/bold]")
    query(collection, "parse a date", where_document={"$contains": "ISO"})
    query(collection, "message header", where_document={"$regex": r"RFC\s?\d{3,4}"})


def query(collection: ochredb.Collection, text: str, **filters: Any) -> None:
    before = time.perf_counter()
    result = collection.query(query_texts=text, n_results=RESULTS, **filters)
    elapsed_ms = (time.perf_counter() - before) * 1000
    documents, metadatas = result["documents"], result["metadatas"]
    distances = result["distances"]
    assert documents is not None
    assert metadatas is not None
    assert distances is not None
    title = f'query "[bold]{escape(text)}[/bold]"'
    for name, condition in filters.items():
        title += f"\n  {name} = [cyan]{escape(repr(condition))}[/cyan]"
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    widths = {"distance": 8, "name": 36 if console.width >= 96 else 28, "kind": 8}
    widths["what it says"] = max(12, console.width - 8 - sum(widths.values()))
    for header, width in widths.items():
        table.add_column(header, width=width, no_wrap=True, overflow="ellipsis")
    table.columns[0].justify = "right"
    for name, document, metadata, distance in zip(
        result["ids"][0], documents[0], metadatas[0], distances[0], strict=True
    ):
        kind = str((metadata or {})["kind"])
        table.add_row(f"{distance:.3f}", f"[green]{escape(name)}[/green]", kind, summary(document))
    console.print(f"\n{title}  [dim]({elapsed_ms:.1f} ms)[/dim]")
    console.print(Padding(table, (0, 0, 0, 2)))


def summary(document: str | None) -> str:
    """The first line of the docstring, after the name."""
    text = (document or "").partition(": ")[2].strip()
    return escape(text.splitlines()[0] if text else "")


def look_up_and_update(collection: ochredb.Collection) -> None:
    """Get by id, count by filter, update, and see the update at once."""
    console.rule("[bold]Look up and update[/bold]")
    record = collection.get(ids=["tempfile.NamedTemporaryFile"])
    console.print("\nget ids = [cyan]['tempfile.NamedTemporaryFile'][/cyan]")
    console.print(f"  {(record['metadatas'] or [{}])[0]}", highlight=True)

    deprecated = collection.get(where_document={"$contains": "deprecated"}, include=[])
    console.print(
        "\nget where_document = [cyan]{'$contains': 'deprecated'}[/cyan]\n"
        f"  {len(deprecated['ids'])} docstrings"
    )

    before = time.perf_counter()
    collection.update(ids=["shutil.copytree"], metadatas=[{"reviewed": True}])
    reviewed = collection.get(where={"reviewed": True})
    elapsed_ms = (time.perf_counter() - before) * 1000
    console.print(
        "\nupdate [green]shutil.copytree[/green] with [cyan]{'reviewed': True}[/cyan], then "
        "get where = [cyan]{'reviewed': True}[/cyan]  "
        f"[dim]({elapsed_ms:.1f} ms)[/dim]\n"
        f"  {reviewed['ids']}, seen at once"
    )
    if reviewed["ids"] != ["shutil.copytree"]:
        sys.exit("The update was not seen.")


def reopen(directory: str) -> None:
    """Open the directory again, as another program would, and find everything in place."""
    console.rule("[bold]Open the directory again[/bold]")
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    size_mb = sum(file.stat().st_size for file in files) / 1e6
    before = time.perf_counter()
    with ochredb.PersistentClient(directory) as client:
        collection = client.get_collection("stdlib")  # Its embedding function is known by name.
        count = collection.count()
        nearest = collection.query(query_texts="copy a directory tree recursively", n_results=1)
        elapsed_ms = (time.perf_counter() - before) * 1000
        reviewed = collection.get(where={"reviewed": True})["ids"]
    console.print(
        f"\n{count:,} records in {size_mb:.1f} MB of {os.path.basename(directory)}; nearest to "
        f'"copy a directory tree recursively":\n  [green]{nearest["ids"][0][0]}[/green]  '
        f"[dim]({elapsed_ms:.0f} ms from opening to the answer)[/dim]"
    )
    if reviewed != ["shutil.copytree"]:
        sys.exit("The update did not survive.")


def progress_bars() -> Progress:
    """Bars that move on a terminal and are printed once, when full, into a file."""
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


if __name__ == "__main__":
    main()
