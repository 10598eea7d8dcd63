"""Rules of the house that no other tool checks; each failure lists every offender.

They keep the tree readable: short files, pages that are true, nothing dead, and nothing in it that
only makes sense on one machine.
"""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINES_MAX = 500
COLUMNS_MAX = 100
SKIPPED_FOLDERS = {
    *(".git", ".venv", "node_modules", "__pycache__", "dist", "build", "data", "ochre-data"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".import_linter_cache"),
}
CODE_SUFFIXES = {".py", ".pyi", ".c", ".h", ".cpp", ".sh", ".mjs", ".js", ".proto", ".sql"}
CODE_SUFFIXES |= {".yaml", ".yml", ".toml"}
CODE_NAMES = {"Makefile", "Dockerfile", "Tiltfile", "run"}
# Longer than LINES_MAX, each with its reason.
LONG_FILES: dict[str, str] = {}
# Assembled, so that this file does not break its own rule.
FORBIDDEN = {
    "the host of a package registry": "|".join(
        re.escape(left + right)
        for left, right in (
            ("pypi", ".org"),
            ("pythonhosted", ".org"),
            ("npmjs", ".org"),
            ("npmjs", ".com"),
            ("yarnpkg", ".com"),
            ("proxy.golang", ".org"),
        )
    ),
    "a path of one machine": rf"(?<![\w.])/{'work'}/|/{'tmp/w'}\b|(?<![\w.*)])/{'root'}\b",
    "how the text came about": "|".join(
        (
            "clau" + "de",
            "anthro" + "pic",
            "chat" + "gpt",
            r"\bAI[- ]" + "generated",
            "helper " + "session",
            "language " + "model wrote",
        )
    ),
}
PACKAGE_ROOTS = (ROOT / "src", *sorted((ROOT / "services").glob("*")))


@cache
def project_files() -> tuple[Path, ...]:
    """Return every file of the project, without what verbs and tools have made."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(
            name
            for name in folders
            if name not in SKIPPED_FOLDERS
            and not name.startswith(".venv")
            and not name.endswith(".egg-info")
        )
        found += [Path(folder, name) for name in sorted(files)]
    return tuple(found)


@cache
def text_of(path: Path) -> str | None:
    """Return a file's text; None if it is not text, as golden files are."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_files() -> Iterator[tuple[Path, list[str]]]:
    for path in project_files():
        generated = path.stem.endswith(("_pb2", "_pb2_grpc"))
        if (path.suffix in CODE_SUFFIXES or path.name in CODE_NAMES) and not generated:
            text = text_of(path)
            assert text is not None, f"{shown(path)} is not UTF-8"
            yield path, text.splitlines()


@cache
def modules() -> dict[str, Path]:
    """Return the dotted name of every module that is installed, packages included."""
    found = {}
    for root in PACKAGE_ROOTS:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_files_are_short() -> None:
    long = {shown(path): len(lines) for path, lines in code_files() if len(lines) > LINES_MAX}
    unexplained = {name: count for name, count in long.items() if name not in LONG_FILES}
    assert not unexplained, f"files above {LINES_MAX} lines: {unexplained}"
    assert LONG_FILES.keys() <= long.keys(), "an exception is no longer needed"


def test_lines_are_short() -> None:
    long = [
        f"{shown(path)}:{number}"
        for path, lines in code_files()
        for number, line in enumerate(lines, 1)
        if len(line.expandtabs(4)) > COLUMNS_MAX
    ]
    assert not long, f"lines above {COLUMNS_MAX} characters: {long}"


def test_nothing_forbidden_is_written() -> None:
    found = []
    for path in project_files():
        for number, line in enumerate((text_of(path) or "").splitlines(), 1):
            found += [
                f"{shown(path)}:{number} holds {what}"
                for what, pattern in FORBIDDEN.items()
                if re.search(pattern, line, re.IGNORECASE)
            ]
    assert not found, found


def test_the_forbidden_patterns_find_what_they_should() -> None:
    samples = {
        "the host of a package registry": "https://files." + "pythonhosted" + ".org/x",
        "a path of one machine": "see /" + "work/main or elsewhere",
        "how the text came about": "AI-" + "generated",
    }
    for what, pattern in FORBIDDEN.items():
        assert re.search(pattern, samples[what], re.IGNORECASE), what


def test_packages_say_what_they_are() -> None:
    mute = []
    for root in PACKAGE_ROOTS:
        folders = {path.parent for path in root.rglob("*.py")} - {root}
        for folder in sorted(folders):
            init = folder / "__init__.py"
            if not init.exists() or not ast.get_docstring(ast.parse(init.read_text())):
                mute.append(shown(folder))
    assert not mute, f"no docstring in __init__.py of {mute}"


def test_modules_say_what_they_are() -> None:
    mute = [
        shown(path)
        for path in project_files()
        if path.suffix == ".py"
        and path.name != "__init__.py"
        and not ast.get_docstring(ast.parse(text_of(path) or ""))
    ]
    assert not mute, f"no docstring in {mute}"


def test_there_are_no_stubs() -> None:
    """A file exists because it holds something; markers are the exception."""
    empty = []
    for path in project_files():
        marker = path.name == "py.typed" or (
            path.name == "__init__.py" and path.is_relative_to(ROOT / "tests")
        )
        if marker:
            continue
        if not path.read_bytes().strip():
            empty.append(shown(path))
        elif path.suffix == ".py" and path.name != "__init__.py":
            body = ast.parse(text_of(path) or "").body
            if all(isinstance(node, ast.Expr | ast.Pass | ast.ImportFrom) for node in body):
                empty.append(shown(path))
    assert not empty, f"nothing in {empty}"


def test_test_folders_are_packages() -> None:
    """Two tests of one name in different folders would otherwise stop mypy."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")} - {ROOT / "tests"}
    missing = [
        shown(folder)
        for folder in sorted(folders)
        if "node_modules" not in folder.parts and not (folder / "__init__.py").exists()
    ]
    assert not missing, f"no __init__.py in {missing}"


def test_every_role_has_a_page() -> None:
    roles = [path for path in (ROOT / "services").iterdir() if path.is_dir()]
    required = [*(role / "README.md" for role in roles), ROOT / "services" / "README.md"]
    required += [ROOT / name / "README.md" for name in ("protos", "k8s", "tilt", "bench")]
    required += [
        ROOT / f"{name}.md"
        for name in ("README", "ARCHITECTURE", "STYLE", "CONTRIBUTING", "CHANGELOG")
    ]
    missing = [shown(path) for path in required if not path.exists()]
    assert not missing, f"missing pages: {missing}"


def behaviour_rows(page: str) -> list[tuple[str, list[str]]]:
    """Return the rows of the table `| behaviour | module |`: behaviour, the paths in backticks."""
    rows, inside = [], False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if [cell.lower() for cell in cells[:2]] == ["behaviour", "module"]:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not set(cells[0]) <= set("-: "):
            rows.append((cells[0], re.findall(r"`([^`]+)`", cells[1])))
    return rows


def test_the_table_of_behaviours_is_true() -> None:
    page = (ROOT / "services" / "README.md").read_text()
    rows = behaviour_rows(page)
    assert rows, "services/README.md has no table | behaviour | module |"
    wrong = []
    for behaviour, paths in rows:
        for path in paths:
            file = path.partition(":")[0]
            places = (ROOT, ROOT / "services", ROOT / "src", ROOT / "src" / "ochredb")
            if not any((place / file).exists() for place in places):
                wrong.append(f"{behaviour}: {path}")
        if not paths:
            wrong.append(f"{behaviour}: no module in backticks")
    assert not wrong, wrong


def pages_named(text: str) -> set[str]:
    """Return the pages of docs/formats that a source names, in either of two forms."""
    flat = " ".join(text.split())
    return {
        *re.findall(r"docs/formats/([\w-]+)\.md", flat),
        *re.findall(r"page `([\w-]+)` in docs/formats", flat),
    }


def test_every_format_has_its_page() -> None:
    """A module with a format version names its page; every page exists, and is named.

    By a module, or for what several formats share, by another page.
    """
    named: set[str] = set()
    unnamed = []
    for path in modules().values():
        text = path.read_text()
        named |= pages_named(text)
        if re.search(r"^FORMAT(_VERSION)? = ", text, re.MULTILINE) and not pages_named(text):
            unnamed.append(shown(path))
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "formats").glob("*.md")}
    linked = {name for text in pages.values() for name in re.findall(r"\(([\w-]+)\.md\b", text)}
    assert not unnamed, f"a format version, but no page is named: {unnamed}"
    assert named <= pages.keys(), f"named, but not written: {named - pages.keys()}"
    unused = pages.keys() - named - linked - {"README"}
    assert not unused, f"pages that nothing names: {unused}"


def imported_names(path: Path, package: str) -> set[str]:
    """Return every dotted name that a source imports, late and by string included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


def test_no_module_is_dead() -> None:
    """Each installed module is imported by another, is an entry point, or is loaded by Alembic.

    Being imported by tests alone does not count, but for the test kits that we ship.
    """
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    entries = {target.partition(":")[0] for target in scripts.values()}
    used: set[str] = set()
    for name, path in modules().items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        used |= imported_names(path, package) - {name}
    for path in (ROOT / "examples").rglob("*.py"):
        used |= imported_names(path, "")
    dead = [
        shown(path)
        for name, path in modules().items()
        if path.name not in ("__init__.py", "__main__.py")
        and name not in used | entries
        and not name.startswith(("ochredb.testing.", "ochredb.catalog.migrations."))
    ]
    assert not dead, f"nothing imports {dead}"


def test_the_lock_is_exact_and_names_no_place() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith((" ", "#", "\t"))]
    loose = [line for line in packages if "==" not in line or not line.endswith("\\")]
    assert packages
    assert not loose, f"no exact version or no hash: {loose}"
    places = [line for line in lines if "://" in line or line.startswith("--")]
    assert not places, places


def test_decisions_have_numbers_of_their_own() -> None:
    """Gaps are numbers given out to what has not landed."""
    names = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [int(name[:4]) for name in names]
    assert numbers[0] == 1
    assert len(set(numbers)) == len(numbers), names
