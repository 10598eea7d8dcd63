"""The pytest plugin that run.py loads into upstream's test run.

* keeps only the tests that talk to the external server, told by the fixtures they use;
* caps hypothesis and takes its chance away, so that two runs see the same examples;
* replaces the default embedding function, which downloads a model, by a deterministic one where
  the model is absent;
* appends one JSON line per event to a file, so that a process that dies leaves what it did.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import hypothesis
import hypothesis.stateful
import numpy as np
import pytest

SERVER_FIXTURES = {
    "api",
    "async_integration",
    "basic_http_client",
    "client",
    "client_factories",
    "http_api_factory",
    "http_client",
    "integration",
    "system",
    "system_http_server",
}
# Collected through the fixtures above, yet these never reach the external server.
LOCAL_FIXTURES = {
    "sqlite",
    "system_auth",
    "system_authn_rbac_authz",
    "system_ssl",
    "system_wrong_auth",
    "system_wrapper",
}
# Cannot pass against an arbitrary host:port, or need a module that no server provides.
EXCLUDED = {
    "test_persist_index_loading_params": "local files and the hnswlib module",
    "test_http_client": "HttpClient() with the default localhost:8000",
    "test_http_client_with_inconsistent_port_settings": "expects the host 'localhost'",
}
EMBEDDING_DIMENSION = 384

_results_path = os.environ["CONFORMANCE_RESULTS"]
_examples_max = int(os.environ["CONFORMANCE_EXAMPLES_MAX"])
_steps_max = int(os.environ["CONFORMANCE_STEPS_MAX"])
_compaction_sleep_s = int(os.environ["CONFORMANCE_COMPACTION_SLEEP_S"])


def record(**event):
    with open(_results_path, "a") as results:
        results.write(json.dumps(event) + "\n")


def capped(settings):
    """Return hypothesis settings of bounded size and without chance, time limits or a database."""
    phases = [phase for phase in hypothesis.Phase if phase.name in ("explicit", "generate")]
    return hypothesis.settings(
        settings,
        max_examples=min(settings.max_examples, _examples_max),
        stateful_step_count=min(settings.stateful_step_count, _steps_max),
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        verbosity=hypothesis.Verbosity.normal,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=phases,
    )


_run_uncapped = hypothesis.stateful.run_state_machine_as_test


def _run_state_machine(factory, *, settings=None, **options):
    if settings is None:
        case = getattr(factory, "TestCase", None)
        settings = getattr(case, "settings", hypothesis.settings.default)
    return _run_uncapped(factory, settings=capped(settings), **options)


hypothesis.stateful.run_state_machine_as_test = _run_state_machine


def _embed(self, input):  # noqa: A002 - the official name of the argument
    """Return one unit vector per document, drawn from a generator seeded by its text."""
    vectors = []
    for document in input:
        seed = int.from_bytes(hashlib.sha256(str(document).encode()).digest()[:8], "big")
        vector = np.random.default_rng(seed).standard_normal(EMBEDDING_DIMENSION)
        vectors.append((vector / np.linalg.norm(vector)).astype(np.float32))
    return vectors


def pytest_configure(config):
    from chromadb.utils.embedding_functions.onnx_mini_lm_l6_v2 import ONNXMiniLM_L6_V2 as Default

    model = Path(Default.DOWNLOAD_PATH) / Default.EXTRACTED_FOLDER_NAME / "model.onnx"
    if not model.exists():
        Default.__init__ = lambda self, *arguments, **named: None
        Default.__call__ = _embed


def _shorten_waits():
    """Make tests that wait for a compaction give up early; upstream waits two minutes."""
    for name, module in list(sys.modules.items()):
        if name.startswith("chromadb.test") and hasattr(module, "COMPACTION_SLEEP"):
            module.COMPACTION_SLEEP = _compaction_sleep_s


def _reaches_the_server(item):
    fixtures = set(getattr(item, "fixturenames", ()))
    name = item.name.split("[")[0]
    return (
        bool(fixtures & SERVER_FIXTURES)
        and not fixtures & LOCAL_FIXTURES
        and (name not in EXCLUDED)
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    _shorten_waits()
    dropped = [item for item in items if not _reaches_the_server(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if _reaches_the_server(item)]
    for item in items:
        module = getattr(item, "module", None)
        if hasattr(module, "COMPACTION_SLEEP"):
            module.COMPACTION_SLEEP = _compaction_sleep_s
        function = getattr(item, "obj", None)
        function = getattr(function, "__func__", function)
        if getattr(function, "is_hypothesis_test", False):
            settings = getattr(function, "_hypothesis_internal_use_settings", None)
            function._hypothesis_internal_use_settings = capped(
                settings or hypothesis.settings.default
            )
        record(event="collected", id=item.nodeid)


def pytest_runtest_logstart(nodeid, location):
    record(event="start", id=nodeid)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        record(
            event="report",
            id=report.nodeid,
            when=report.when,
            outcome=report.outcome,
            message=_first_words(report),
        )


def _first_words(report):
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        return crash.message[:300] if crash else str(report.longrepr)[-300:]
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:200]
    return ""


def pytest_collectreport(report):
    if report.failed:
        record(event="collect_error", id=report.nodeid, message=str(report.longrepr)[-300:])
