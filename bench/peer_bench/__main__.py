"""The command line: which servers, how much of everything, which phases."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from . import __doc__ as description
from . import phases_indexed, phases_ingest, phases_life, phases_many, phases_query
from .bench import Bench
from .data import BATCH, Data
from .report import metrics, table
from .servers import Server

BASIC = ("ingest", "query", "filter", "doc", "get", "mix", "ryw", "footprint")
EXTRA = ("indexed", "settle", "under_ingest", "spaces", "target", "many")
# Phases on one collection of n records: that of `indexed`, else of `ingest`, else loaded for them.
ON_MAIN = {"query", "target", "filter", "doc", "get", "ryw", "mix"}
QUICK = {"n": 5000, "slice": 0.3, "rounds": 2, "warm": 0.1, "warm_many": 1.0, "nq": 200}
# Where the servers ran says nothing about the result.
OF_THE_MACHINE = {"out", *(f"{what}{key}" for what in ("", "pid_", "data_") for key in "ab")}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="peer_bench",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--a", required=True, help="base URL of server A")
    p.add_argument("--b", help="base URL of server B")
    for key in "ab":
        p.add_argument(f"--label-{key}", default=key.upper())
        p.add_argument(f"--pid-{key}", type=int)
        p.add_argument(f"--data-{key}", help="data directory (bytes on disk)")
        p.add_argument(f"--cold-cmd-{key}", help="command that starts the server (cold)")
        p.add_argument(
            f"--query-extra-{key}",
            type=orjson.loads,
            help="JSON fields that only its queries get (query, spaces)",
        )
    p.add_argument("--n", type=int, default=20000)
    p.add_argument("--dims", default="128", help="dimensions, comma separated")
    p.add_argument("--nq", type=int, default=500, help="query vectors")
    p.add_argument("--seed", type=int, default=7)
    p.add_argument("--encoding", choices=["auto", "b64", "json"], default="auto")
    p.add_argument("--hnsw", type=orjson.loads, help="hnsw configuration as JSON")
    p.add_argument("--slice", type=float, default=0.6, help="seconds per slice")
    p.add_argument("--rounds", type=int, default=5, help="slices per server and phase")
    p.add_argument("--ingest-rounds", type=int, default=4)
    p.add_argument("--warm", type=float, default=0.3, help="seconds of warm-up, one client")
    p.add_argument("--warm-many", type=float, default=3.0, help="the same, several clients")
    p.add_argument("--indexed-rounds", type=int, default=2, help="whole ingests per server")
    p.add_argument("--indexed-rounds-b", type=int, help="the same for B, if it is to do fewer")
    p.add_argument("--writers", type=int, default=1, help="also ingest whole with these (indexed)")
    p.add_argument("--writers-n", type=int, help="records for that; default n")
    p.add_argument("--spaces-n", type=int, help="records (spaces); default n / 2")
    p.add_argument("--cold-rounds", type=int, default=3, help="starts per server (cold)")
    p.add_argument("--offered", type=float, default=10000, help="records/s (under_ingest)")
    p.add_argument("--qrate", type=float, default=200, help="queries/s (under_ingest)")
    p.add_argument("--under-s", type=float, help="seconds per slice (under_ingest); 8, quick 3")
    p.add_argument("--settle-s", type=float, help="seconds to wait (settle); 90, quick 5")
    p.add_argument("--many", type=int, help="number of collections (many); 500, quick 100")
    p.add_argument("--many-b", type=int, help="the same for B, if it is to have fewer")
    p.add_argument("--only", default=",".join(BASIC), help="phases, comma separated, or all")
    p.add_argument("--collection", help="existing collection for the read phases or cold")
    p.add_argument("--skip-w4", action="store_true", help="skip the 4-writer and JSON ingest")
    p.add_argument("--keep", action="store_true", help="keep the collections")
    p.add_argument("--quick", action="store_true", help="5,000 records, short slices")
    p.add_argument("--out", type=Path, help="file for the JSON result")
    return p


def chosen(p: argparse.ArgumentParser, options: argparse.Namespace) -> set[str]:
    """Return the phases to run, and fill in what depends on --quick; exits on a contradiction."""
    if options.quick:
        vars(options).update(QUICK)
    for key, full, quick in (("under_s", 8.0, 3.0), ("settle_s", 90.0, 5.0), ("many", 500, 100)):
        if getattr(options, key) is None:
            setattr(options, key, quick if options.quick else full)
    known = {*BASIC, *EXTRA}
    only = set(known) if options.only == "all" else set(options.only.split(","))
    if unknown := only - {*known, "cold"}:
        p.error(f"unknown phases {sorted(unknown)}; known: {', '.join(sorted(known))}, cold")
    if "cold" in only and only != {"cold"}:
        p.error("cold starts and stops the servers: run it alone")
    if "settle" in only:
        only.add("indexed")  # Memory and disk of what?
    if options.b and options.label_a == options.label_b:
        p.error("labels must differ")
    return only


def servers_of(options: argparse.Namespace) -> list[Server]:
    values = vars(options)
    return [
        Server(
            values[f"label_{key}"],
            values[key],
            pid=values[f"pid_{key}"],
            directory=values[f"data_{key}"],
            encoding=options.encoding,
            hnsw=options.hnsw,
            query_extra=values[f"query_extra_{key}"],
        )
        for key in "ab"
        if values[key]
    ]


def run_dimension(bench: Bench, data: Data, only: set[str], with_many: bool) -> None:
    """Run the phases on one corpus."""
    options, dim = bench.options, data.dim
    main, four, json = (f"bench{dim}_{what}" for what in ("main", "w4", "json"))
    if only == {"cold"}:
        phases_life.cold(bench, data, options.collection or main)
        return
    collections = written_by_four = None
    if "footprint" in only or "settle" in only:
        phases_ingest.footprint(bench, "before")
    if "indexed" in only:
        collections = phases_indexed.indexed(bench, data, data.n, 1, main, "settle" in only)
        if options.writers > 1:
            n = min(data.n, options.writers_n or data.n)
            written_by_four = phases_indexed.indexed(bench, data, n, options.writers, four)
    if "ingest" in only:
        one = f"bench{dim}_w1" if collections else main
        written_in_slices = phases_ingest.ingest(bench, data, data.n, 1, one)
        collections = collections or written_in_slices
        if "footprint" in only:
            phases_ingest.footprint(bench, "after ingest")
        if not options.skip_w4:
            written_by_four = phases_ingest.ingest(bench, data, data.n, 4, four)
            phases_ingest.ingest(bench, data, max(BATCH, data.n // 4), 1, json, False)
    if collections is None and only & ON_MAIN:
        if options.collection:
            named = options.collection
            collections = {server.label: server.find(named) for server in bench.servers}
        else:
            collections = bench.load(data, main, data.n)
    if collections is not None:
        for phase, run in (
            ("query", phases_query.queries),
            ("target", phases_query.target),
            ("filter", phases_query.filters),
            ("doc", phases_query.documents),
            ("get", phases_query.gets),
            ("ryw", phases_life.read_your_writes),
        ):
            if phase in only:
                run(bench, data, collections)
        if "ryw" in only:
            phases_life.idle_adds(bench, data)
        if "mix" in only:
            phases_life.mix(bench, data, written_by_four or collections)
    if "footprint" in only:
        phases_ingest.footprint(bench, "end")
    if not options.keep and not options.collection:
        bench.drop(main, four, json, f"bench{dim}_w1")
    for phase, alone in (
        ("under_ingest", phases_ingest.under_ingest),
        ("spaces", phases_query.spaces),
    ):
        if phase in only:
            alone(bench, data)
    if "many" in only and with_many:
        phases_many.many(bench, data)


def processor() -> str:
    """Return the processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main() -> int:
    p = parser()
    options = p.parse_args()
    only = chosen(p, options)
    servers = servers_of(options)
    labels = [server.label for server in servers]
    if only != {"cold"}:
        for server in servers:
            server.probe()
    start_s = time.perf_counter()
    report: dict[str, Any] = {
        "args": {k: v for k, v in vars(options).items() if k not in OF_THE_MACHINE},
        "load_before": os.getloadavg(),
        "cpus": os.cpu_count(),
        "dims": {},
    }
    texts, measured = [], []
    for number, dim in enumerate(map(int, options.dims.split(","))):
        bench = Bench(options, servers)
        bench.log(f"dim={dim} n={options.n}: generating data")
        data = Data(options.n, dim, options.nq, options.seed)
        gc.collect()
        gc.freeze()  # No collector pauses over the corpus inside timed loops.
        run_dimension(bench, data, only, with_many=number == 0)
        found = metrics(bench.rows, labels, dim)
        measured += found
        cores = "; ".join(f"{ph} [{label}] {s or '?'}/{c}" for ph, label, s, c in bench.cores)
        texts.append(f"\n### {options.n} x {dim}d\n\n{table(found, labels)}")
        texts.append(f"\nCPU cores used (server / client): {cores}")
        report["dims"][str(dim)] = {"cores": bench.cores}
    report["load_after"] = os.getloadavg()
    report["date"] = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    python = f"Python {platform.python_version()}"
    report["machine"] = {"processor": processor(), "python": python}
    report["wall_s"] = round(time.perf_counter() - start_s, 1)
    report["versions"] = {server.label: server.version for server in servers}
    report["base64"] = {server.label: server.base64 for server in servers}
    # One metric per line, so that a result can be searched by line.
    lines = b",\n".join(orjson.dumps(one) for one in measured)
    text = orjson.dumps(report)[:-1] + b',"metrics":[\n' + lines + b"\n]}\n"
    if options.out:
        options.out.write_bytes(text)
    else:
        sys.stdout.write(text.decode())
    print("\n".join(texts))
    print(f"\nwall {report['wall_s']} s, load {report['load_before']} -> {report['load_after']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
