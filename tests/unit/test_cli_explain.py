"""`ochredb explain` on a directory and on a server: what it prints, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ochredb
from ochredb.embedding_functions import LexicalEmbeddingFunction
from ochredb.explain import PlanStep
from ochredb.testing.server_process import ServerProcess, ochredb_server
from ochredb_node.cli import main

TOKEN = "s3cret"
COUNT = 60


def fill(client: ochredb.ClientAPI) -> None:
    """60 records on a line; half of them are even."""
    collection = client.create_collection("numbers")
    collection.add(
        ids=[f"n{number}" for number in range(COUNT)],
        embeddings=[[float(number), 1.0] for number in range(COUNT)],
        documents=[f"number {number}" for number in range(COUNT)],
        metadatas=[{"even": number % 2 == 0} for number in range(COUNT)],
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("explain") / "data"
    with ochredb.PersistentClient(path) as client:
        fill(client)
    return str(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("explain-server") / "data"
    with ochredb_server(directory, environment={"OCHREDB_TOKEN": TOKEN}) as running:
        with ochredb.HttpClient(running.url, headers={"X-Chroma-Token": TOKEN}) as client:
            fill(client)
        yield running
    assert running.returncode == 0, running.output_tail()


@pytest.fixture(params=["directory", "server"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "directory":
        return str(request.getfixturevalue("directory"))
    monkeypatch.setenv("OCHREDB_TOKEN", TOKEN)
    server: ServerProcess = request.getfixturevalue("server")
    return server.url


def explained(
    capsys: pytest.CaptureFixture[str], target: str, *options: str
) -> tuple[int, PlanStep]:
    """How many records answered, and the plan."""
    status = main(["explain", target, "numbers", "--json", *options])
    output, errors = capsys.readouterr()
    assert (status, errors) == (0, "")
    document: dict[str, Any] = json.loads(output)
    assert set(document) == {"records", "elapsed_us", "plan"}
    plan = PlanStep.from_json(document["plan"])
    assert 0 < plan.time_us <= document["elapsed_us"]
    return document["records"], plan


def operators(plan: PlanStep) -> set[str]:
    return {plan.operator}.union(*(operators(step) for step in plan.steps))


def test_a_get_is_explained(capsys: pytest.CaptureFixture[str], target: str) -> None:
    records, plan = explained(capsys, target, "--where", '{"even": true}')
    assert records == COUNT // 2
    assert "Filter" in operators(plan)
    records, plan = explained(
        capsys, target, "--where-document", '{"$contains": "number 1"}', "--limit", "3"
    )
    assert records == 3
    records, plan = explained(capsys, target)
    assert records == COUNT


def test_a_query_is_explained(capsys: pytest.CaptureFixture[str], target: str) -> None:
    records, plan = explained(capsys, target, "--vector", "[3, 1.0]")
    assert records == 10
    assert "Nearest" in operators(plan)
    records, plan = explained(
        capsys, target, "--like", "n7", "--n-results", "40", "--exact", "--target-recall", "0.5",
        "--where", '{"even": false}', "--warm",
    )  # fmt: skip
    assert records == COUNT // 2
    assert "Graph" not in operators(plan)


def test_without_json_it_prints_the_tree(capsys: pytest.CaptureFixture[str], target: str) -> None:
    assert main(["explain", target, "numbers", "--like", "n7", "--n-results", "1"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    first, *_, empty, last = output.splitlines()
    assert "Query" in first and "├─ " in output and "└─ " in output
    assert empty == "" and last.startswith("1 record in ") and last.endswith("as the client saw it")
    assert max(map(len, output.splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("nothing",), "Collection [nothing] does not exist"),
        (("numbers", "--like", "n60"), "no record n60 in numbers"),
        (("numbers", "--where", '{"a": {"$foo": 1}}'), "Invalid where clause"),
        (("numbers", "--vector", "[1]"), "dimension of 2, got 1"),
        (("numbers", "--vector", "[1, 2]", "--n-results", "0"), "n_results must be positive"),
        (("numbers", "--vector", "[1, 2]", "--target-recall", "1"), "target_recall must be a"),
        (("numbers", "--tenant", "nobody"), "nobody"),
        (("numbers", "--database", "nowhere"), "nowhere"),
    ],
)
def test_reads_that_fail_say_why(
    capsys: pytest.CaptureFixture[str], target: str, options: tuple[str, ...], problem: str
) -> None:
    assert main(["explain", target, *options]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("ochredb: ") and problem in errors


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--exact",), "--exact is not for a get"),
        (("--n-results", "3"), "--n-results is not for a get"),
        (("--target-recall", "0"), "--target-recall is not for a get"),
        (("--vector", "[1, 2]", "--limit", "3"), "--limit is not for a query"),
    ],
)
def test_options_of_the_other_kind_of_read_are_refused(
    capsys: pytest.CaptureFixture[str], directory: str, options: tuple[str, ...], problem: str
) -> None:
    assert main(["explain", directory, "numbers", *options]) == 2
    assert capsys.readouterr().err == f"ochredb: {problem}\n"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--where", "{"), "--where: not JSON"),
        (("--where", "[]"), "--where: expected a JSON object, not []"),
        (("--vector", "{}"), "--vector: expected a JSON list of numbers, not {}"),
        (("--vector", "[1, true]"), "--vector: expected a JSON list of numbers"),
        (("--vector", "[1]", "--like", "a"), "not allowed with argument --vector"),
    ],
)
def test_bad_options_are_named(
    capsys: pytest.CaptureFixture[str], directory: str, options: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["explain", directory, "numbers", *options])
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err


def test_a_directory_without_a_database_stays_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert main(["explain", str(path), "numbers"]) == 1
        assert "neither a URL nor a directory with an OchreDB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_server_wants_its_token(
    capsys: pytest.CaptureFixture[str], server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OCHREDB_TOKEN", raising=False)
    assert main(["explain", server.url, "numbers"]) == 1
    assert "oken" in capsys.readouterr().err
    assert main(["explain", server.url, "numbers", "--token", TOKEN]) == 0
    monkeypatch.setenv("OCHREDB_TOKEN", "wrong")
    assert main(["explain", server.url, "numbers", "--token", TOKEN]) == 0


def test_nobody_there_is_said_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "http://127.0.0.1:1", "numbers"]) == 1
    assert "cannot connect to http://127.0.0.1:1" in capsys.readouterr().err


def test_a_function_that_is_not_registered_here_is_no_obstacle(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Elsewhere(LexicalEmbeddingFunction):
        @staticmethod
        def name() -> str:
            return "registered-elsewhere"

    with ochredb.PersistentClient(tmp_path) as client:
        made = client.create_collection("numbers", embedding_function=Elsewhere())
        made.add(ids=["a"], documents=["x"])
    records, _ = explained(capsys, str(tmp_path), "--like", "a")
    assert records == 1


def test_help_needs_neither_engine_nor_client() -> None:
    program = (
        "import sys; from ochredb_node.cli import main\n"
        "try: main(['explain', '--help'])\n"
        "except SystemExit: print(*sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert loaded.isdisjoint({"numpy", "orjson", "httpx", "pyarrow", "sqlalchemy"})
    assert "--target-recall" in run.stdout
