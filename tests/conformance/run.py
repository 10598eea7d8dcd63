"""Run the official client's own tests over HTTP against one or more running servers.

    python run.py --python VENV/bin/python --url 127.0.0.1:8100 [--url 127.0.0.1:8101] \
        --baseline baseline.txt

VENV holds the packages of requirements.txt; the tests come from the chromadb wheel installed there.
The suite RESETS the servers between tests: they must be throw-away ones that allow it. With several
--url the files are shared out, one pytest process per server at a time.

Modes: `integration` is what upstream runs against its single-node server; `extended` adds the tests
that upstream skips there (search, fork, ...); `cluster` is upstream's selection for its cluster.

Exit code: with --baseline, 1 if a test that passes there does not pass here; else 1 if any failed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Path below chromadb/test -> seconds the whole file may take; the longest first, so that two
# servers end at about the same time. Files whose tests never reach an external server are left out.
FILES = {
    "test_api.py": 900,
    "property/test_embeddings.py": 900,
    "property/test_filtering.py": 900,
    "property/test_add.py": 900,
    "api/test_schema_e2e.py": 600,
    "property/test_collections.py": 600,
    "property/test_collections_with_database_tenant.py": 600,
    "configurations/test_collection_configuration.py": 600,
    "test_multithreaded.py": 600,
    "stress/test_many_collections.py": 600,
    "api/test_collection.py": 300,
    "api/test_count_api.py": 300,
    "api/test_delete_database.py": 300,
    "api/test_fork_count_api.py": 300,
    "api/test_get_database.py": 300,
    "api/test_indexing_status.py": 600,
    "api/test_invalid_update.py": 300,
    "api/test_limit_offset.py": 300,
    "api/test_list_databases.py": 300,
    "api/test_numpy_list_inputs.py": 300,
    "api/test_search_api.py": 300,
    "client/test_database_tenant.py": 300,
    "client/test_multiple_clients_concurrency.py": 300,
    "data_loader/test_data_loader.py": 300,
    "property/test_fork.py": 600,
    "property/test_schema.py": 300,
    "test_client.py": 300,
}
# Only meaningful on a server that offers the cluster's features.
CLUSTER_FILES = {
    "distributed/test_sanity.py": 600,
    "distributed/test_task_api.py": 600,
    "distributed/test_statistics_wrapper.py": 600,
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one test ended: passed, failed, error or skipped, and its first words on why."""

    kind: str
    message: str = ""


Outcomes = dict[str, Outcome]


def log(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def installed_tests(python: str) -> Path:
    """Return the folder that holds the package `chromadb` of the interpreter `python`."""
    code = "import chromadb, os; print(os.path.dirname(os.path.dirname(chromadb.__file__)))"
    root = Path(subprocess.check_output([python, "-c", code], text=True).splitlines()[-1])
    if not (root / "chromadb" / "test").is_dir():
        sys.exit("the installed chromadb carries no tests: is it the full wheel, not the client?")
    return root


def environment(options: argparse.Namespace, address: str, results: Path) -> dict[str, str]:
    """Return the variables that upstream's fixtures and our plugin read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CHROMA_")}
    host, _, port = address.partition(":")
    if options.mode == "cluster":
        kept.update(CHROMA_CLUSTER_TEST_ONLY="1", CHROMA_SERVER_HOST=address)
    else:
        # Upstream's fixtures look whether this is set; its skips look whether it equals "1".
        kept["CHROMA_INTEGRATION_TEST_ONLY"] = "1" if options.mode == "integration" else "extended"
        kept.update(CHROMA_SERVER_HOST=host, CHROMA_SERVER_HTTP_PORT=port)
    kept.update(
        ANONYMIZED_TELEMETRY="False",
        PROPERTY_TESTING_PRESET="fast",
        CONFORMANCE_RESULTS=str(results),
        CONFORMANCE_EXAMPLES_MAX=str(options.max_examples),
        CONFORMANCE_STEPS_MAX=str(options.steps),
        CONFORMANCE_COMPACTION_SLEEP_S=str(options.compaction_sleep),
        PYTHONDONTWRITEBYTECODE="1",
        PYTHONPATH=str(HERE),
    )
    return kept


def run_file(
    options: argparse.Namespace, root: Path, name: str, limit_s: int, address: str, out: Path
) -> Outcomes:
    """Run one test file against the server at `address`; the log and results stay in `out`."""
    tag = name.replace("/", "__").removesuffix(".py")
    results = out / f"{tag}.jsonl"
    command = [options.python, "-m", "pytest", str(root / "chromadb" / "test" / name)]
    command += ["-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider"]
    command += ["-p", "conformance_plugin", "--import-mode=importlib", "-o", "asyncio_mode=auto"]
    command += ["-o", f"pythonpath={root}", "-q", "--tb=short", "-W", "ignore"]
    command += ["--timeout", str(options.test_timeout)]
    if options.k:
        command += ["-k", options.k]
    # A folder of its own: some tests write to the working directory.
    scratch = out / f"cwd_{tag}"
    scratch.mkdir(exist_ok=True)
    with (out / f"{tag}.log").open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=scratch,
            env=environment(options, address, results),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f"stopped after {limit_s} s"
    return read_results(results, name, code)


def read_results(results: Path, name: str, code: int | str) -> Outcomes:
    """Fold the plugin's event lines into one outcome per test.

    A test that was collected but left no result (its process died or ran out of time) is an error.
    """
    events = []
    if results.exists():
        events = [json.loads(line) for line in results.read_text().splitlines()]
    collected: dict[str, bool] = {}  # Test -> was it started.
    outcomes: Outcomes = {}
    for event in events:
        test = test_name(event["id"])
        if event["event"] == "collected":
            collected.setdefault(test, False)
        elif event["event"] == "start":
            collected[test] = True
        elif event["event"] == "collect_error":
            outcomes[test] = Outcome("error", event["message"])
        else:
            kind = event["outcome"]
            if kind == "failed" and event["when"] != "call":
                kind = "error"
            if kind == "error" or outcomes.get(test, Outcome("passed")).kind == "passed":
                outcomes[test] = Outcome(kind, event["message"])
    for test, started in collected.items():
        where = "in the middle" if started else "before it"
        outcomes.setdefault(test, Outcome("error", f"the run ended {where}: pytest said {code}"))
    if not outcomes and code not in (0, 5):
        outcomes[f"chromadb/test/{name}"] = Outcome("error", f"pytest said {code}; see its log")
    return outcomes


def test_name(node_id: str) -> str:
    """Return the node id from chromadb/test on, without the parameter of upstream's topology."""
    start = max(node_id.find("chromadb/test/"), 0)
    return node_id[start:].replace("[single-region]", "").replace("[multi-region]", "")


def counts(outcomes: Outcomes) -> str:
    """Return "N passed, N failed, N errors, N skipped"."""
    count = collections.Counter(outcome.kind for outcome in outcomes.values())
    return (
        f"{count['passed']} passed, {count['failed']} failed, "
        f"{count['error']} errors, {count['skipped']} skipped"
    )


def run_all(options: argparse.Namespace, out: Path) -> Outcomes:
    """Share the test files out between the servers and return every outcome."""
    root = installed_tests(options.python)
    files = {**FILES, **(CLUSTER_FILES if options.mode == "cluster" else {})}
    if options.files:
        files = {name: {**FILES, **CLUSTER_FILES}.get(name, 600) for name in options.files}
    waiting: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for name, limit_s in files.items():
        if (root / "chromadb" / "test" / name).exists():
            waiting.put((name, limit_s))
    outcomes: Outcomes = {}
    lock, start_s = threading.Lock(), time.monotonic()

    def work(address: str) -> None:
        while True:
            try:
                name, limit_s = waiting.get_nowait()
            except queue.Empty:
                return
            begin_s = time.monotonic()
            found = run_file(options, root, name, limit_s, address, out)
            with lock:
                outcomes.update(found)
            now_s = time.monotonic()
            log(f"[{now_s - start_s:6.1f}s] {name:52s} {now_s - begin_s:6.1f}s {counts(found)}")

    with concurrent.futures.ThreadPoolExecutor(len(options.url)) as pool:
        for done in [pool.submit(work, address) for address in options.url]:
            done.result()
    return outcomes


def read_baseline(path: Path) -> dict[str, str]:
    """Return test -> outcome from lines "outcome TAB test"; lines starting with # are comments."""
    lines = path.read_text().splitlines()
    pairs = (line.split("\t", 1) for line in lines if line and not line.startswith("#"))
    return {test: kind for kind, test in pairs}


def compare(outcomes: Outcomes, baseline: dict[str, str], files: list[str] | None) -> list[str]:
    """Print what is worse and better than the baseline; return the regressions."""
    missing = Outcome("missing")
    worse = [
        test
        for test, kind in sorted(baseline.items())
        if kind == "passed"
        and outcomes.get(test, missing).kind != "passed"
        and (not files or any(f"/{name}::" in test for name in files))
    ]
    better = [
        test
        for test, outcome in sorted(outcomes.items())
        if outcome.kind == "passed" and baseline.get(test) != "passed"
    ]
    for test in worse:
        outcome = outcomes.get(test, missing)
        print("REGRESSION", test, outcome.kind, outcome.message.replace("\n", " ")[:300])
    for test in better:
        print("BETTER", test, "baseline:", baseline.get(test, "missing"))
    passed = sum(kind == "passed" for kind in baseline.values())
    print(f"{len(worse)} regressions, {len(better)} better, {passed} passed in the baseline")
    return worse


def write_baseline(path: Path, options: argparse.Namespace, outcomes: Outcomes) -> None:
    """Write the outcomes in the form that read_baseline reads."""
    head = f"# mode={options.mode} max_examples={options.max_examples} steps={options.steps}\n"
    lines = [f"{outcome.kind}\t{test}\n" for test, outcome in sorted(outcomes.items())]
    path.write_text(head + "".join(lines))


def parser() -> argparse.ArgumentParser:
    """Return the command line; `against_ochredb.py` adds nothing but the servers' addresses."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--url", action="append", help="host:port of a server (repeatable)")
    p.add_argument("--python", default=sys.executable, help="interpreter of the peer's environment")
    p.add_argument("--mode", choices=["integration", "extended", "cluster"], default="integration")
    p.add_argument("--files", nargs="*", help="only these (below chromadb/test)")
    p.add_argument("-k", help="only tests that match, as in pytest")
    p.add_argument("--max-examples", type=int, default=10)
    p.add_argument("--steps", type=int, default=15, help="steps of a state machine")
    p.add_argument("--test-timeout", type=int, default=240, help="seconds per test")
    p.add_argument(
        "--compaction-sleep", type=int, default=15, help="seconds a test waits for a compaction"
    )
    p.add_argument("--baseline", type=Path, help="compare with this file")
    p.add_argument("--write-baseline", type=Path)
    p.add_argument("--out", type=Path, help="folder for logs (default: a temporary one)")
    return p


def execute(options: argparse.Namespace) -> int:
    """Run, report, and return the exit code."""
    if os.sep in options.python:  # It runs in other folders. Links stay: they make the environment.
        options.python = os.path.abspath(options.python)
    out = options.out or Path(tempfile.mkdtemp(prefix="conformance_"))
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start_s = time.monotonic()
    outcomes = run_all(options, out)
    broken = {t: o for t, o in sorted(outcomes.items()) if o.kind in ("failed", "error")}
    for test, outcome in broken.items():
        print(outcome.kind.upper(), test, outcome.message.replace("\n", " ")[:300])
    if options.write_baseline:
        write_baseline(options.write_baseline, options, outcomes)
    code = 1 if broken or not outcomes else 0
    if options.baseline:
        baseline = read_baseline(options.baseline)
        if options.k:  # A part of each file: what was not chosen is not missing.
            baseline = {test: kind for test, kind in baseline.items() if test in outcomes}
        worse = compare(outcomes, baseline, options.files)
        code = 1 if worse or not outcomes else 0
    log(f"logs: {out}")
    print(f"{counts(outcomes)} in {time.monotonic() - start_s:.1f}s")
    return code


def main() -> int:
    p = parser()
    options = p.parse_args()
    if not options.url:
        p.error("--url is required")
    options.url = [url.removeprefix("http://").rstrip("/") for url in options.url]
    return execute(options)


if __name__ == "__main__":
    sys.exit(main())
