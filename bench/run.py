"""Compare our server with the official one: start both fresh, measure in one run, keep the result.

    python bench/run.py --size 20k-128              # one size with its bars; several are allowed
    python bench/run.py --full                      # every size, one after the other
    python bench/run.py --name mine -- --n 20000 --only query,filter
    python bench/run.py --only-ours -- --n 20000 --only query,filter    # nothing is kept
    python bench/run.py --write-up-only             # tables, pictures, README section anew

What follows `--` goes to peer_bench as it is (after the size's own arguments). A is ours, B the
official server, out of the environment .venv-peer that `make bench` builds. Writes, into results/,
NAME.json (everything), NAME.md (verdicts, all figures, circumstances) and NAME.svg (the picture).
A missed bar is no error: the exit code is that of the measurement.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import orjson
from bars import summary, verdict_table, verdicts
from sizes import FULL, SIZES
from writeup import LABELS, write_everything

from ochredb.testing.server_process import (
    HOST,
    ONE_THREAD,
    ServerProcess,
    free_port,
    ochredb_server,
)

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-peer" / "bin" / "chroma"
RESULTS, README = HERE / "results", HERE.parent / "README.md"
# Ours reaches a target recall by default; beside a server that does not, `ef_search` alone counts.
SAME_EFFORT = ("--query-extra-a", '{"target_recall":0}')


class Side:
    """One server of the comparison, not yet started."""

    def __init__(self, key: str, label: str, server: ServerProcess, data: Path) -> None:
        self.key, self.label, self.server, self.data = key, label, server, data

    def arguments(self) -> list[str]:
        """Return what peer_bench has to know of it, whether it runs or not."""
        return [f"--{self.key}", self.server.url, f"--label-{self.key}", self.label]


def peer_server(peer: Path, directory: Path) -> ServerProcess:
    """Return the official server, not yet started, with its data under `directory`/data."""
    port = free_port()
    directory.mkdir()
    configuration = directory / "config.yaml"
    configuration.write_text(
        f'port: {port}\nlisten_address: "{HOST}"\n'
        f'persist_path: "{directory / "data"}"\nallow_reset: true\n'
    )
    command = [str(peer), "run", str(configuration)]
    return ServerProcess(command, port, directory / "server.log")


def sides_in(scratch: Path, peer: Path | None) -> list[Side]:
    """Return fresh servers with their data in `scratch`; ours alone without a `peer`."""
    ours = ochredb_server(scratch / "ours")
    sides = [Side("a", LABELS[0], ours, scratch / "ours")]
    if peer:
        server = peer_server(peer, scratch / "peer")
        sides.append(Side("b", LABELS[1], server, scratch / "peer" / "data"))
    return sides


def peer_bench(arguments: list[str]) -> int:
    """Run peer_bench in a process of its own; return its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "peer_bench", *SAME_EFFORT, *arguments],
        cwd=HERE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **ONE_THREAD},
        check=False,
    )
    return done.returncode


def measure(out: Path, peer: Path | None, arguments: list[str], cold: bool) -> int:
    """Measure on fresh servers into the file `out`; return an exit code."""
    with tempfile.TemporaryDirectory(prefix="ochredb_bench_") as directory:
        sides = sides_in(Path(directory), peer)
        given = ["--out", str(out), "--keep"]
        try:
            for side in sides:
                side.server.start()
                given += side.arguments()
                given += [f"--pid-{side.key}", str(side.server.pid)]
                given += [f"--data-{side.key}", str(side.data)]
            code = peer_bench([*given, *arguments])
        finally:
            ended = [side.server.stop() for side in sides if side.server.running]
        code = code or ended[0]
        if not code and cold:
            code = measure_cold(out, sides, Path(directory) / "cold.json")
        if code:
            for side in sides:
                print(f"{side.label} said:\n{side.server.output_tail()}", file=sys.stderr)
    return code


def measure_cold(out: Path, sides: list[Side], scratch: Path) -> int:
    """Time the starts of the stopped servers on what they stored; add that to the result `out`."""
    result = orjson.loads(out.read_bytes())
    dim = next(iter(result["dims"]))
    given = ["--out", str(scratch), "--only", "cold", "--dims", dim, "--cold-rounds", "5"]
    given += ["--n", str(result["args"]["n"]), "--collection", f"bench{dim}_main"]
    for side in sides:
        command = shlex.join(side.server.command)
        given += [*side.arguments(), f"--cold-cmd-{side.key}", command]
    code = peer_bench(given)
    if not code:
        more = orjson.loads(scratch.read_bytes())
        result["metrics"] += more["metrics"]
        result["load_after"] = more["load_after"]
        result["wall_s"] = round(result["wall_s"] + more["wall_s"], 1)
        head = orjson.dumps({k: v for k, v in result.items() if k != "metrics"})
        lines = b",\n".join(orjson.dumps(one) for one in result["metrics"])
        out.write_bytes(head[:-1] + b',"metrics":[\n' + lines + b"\n]}\n")
    return code


def say_verdicts(name: str, out: Path) -> None:
    result = orjson.loads(out.read_bytes())
    if found := verdicts(name, result["metrics"]):
        labels = [*result["versions"], "-"][:2]
        print(f"\n{verdict_table(found, labels)}\n\n{name}: {summary(found)}", flush=True)


def options_of() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", action="append", choices=list(SIZES), help="a size; may be repeated")
    p.add_argument("--full", action="store_true", help=f"the sizes {', '.join(FULL)}")
    p.add_argument("--name", help="name of the result's files; default: that of the size")
    p.add_argument("--only-ours", action="store_true", help="without the official server")
    p.add_argument("--peer", type=Path, default=PEER, help="its `chroma` command")
    p.add_argument("--no-cold", action="store_true", help="do not time starts afterwards")
    p.add_argument("--results", type=Path, default=RESULTS, help="directory of the results")
    p.add_argument("--write-up-only", action="store_true", help="from existing JSON results")
    p.add_argument("more", nargs="*", help="arguments of peer_bench, after --")
    return p, p.parse_args()


def runs_of(options: argparse.Namespace) -> list[tuple[str | None, list[str], bool]]:
    """Return name, arguments and whether to time starts, of each run asked for."""
    sizes = [*(options.size or ()), *(FULL if options.full else ())]
    if not sizes:
        return [(options.name, options.more, False)]
    return [
        (
            options.name or size,
            [*SIZES[size].arguments, *options.more],
            SIZES[size].cold and not options.no_cold,
        )
        for size in dict.fromkeys(sizes)
    ]


def main() -> int:
    p, options = options_of()
    results = options.results.resolve()
    readme = README if results == RESULTS else None
    if options.write_up_only:
        write_everything(results, readme, [options.name] if options.name else [])
        return 0
    peer = None if options.only_ours else options.peer
    if peer and not peer.exists():
        p.error(f"{peer} is missing: `make bench` builds it")
    runs = runs_of(options)
    if options.name and len(runs) > 1:
        p.error("--name is for one run")
    # An installed package is compiled; a server out of a checkout shall be, after its first start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Without the official server, a size's name stays free: its result is that of a comparison.
    keep = not options.only_ours or bool(options.name)
    if options.only_ours and options.name in SIZES:
        p.error(f"{options.name} names a comparison; give another --name")
    for name, arguments, cold in runs:
        if os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1):
            print("warning: the machine is busy; ratios of wall time will be noisy", flush=True)
        with tempfile.TemporaryDirectory(prefix="ochredb_bench_") as scratch:
            kept = results if keep and name else Path(scratch)
            kept.mkdir(parents=True, exist_ok=True)
            out = kept / f"{name or 'unnamed'}.json"
            code = measure(out, peer, arguments, cold)
            if code:
                return code
            say_verdicts(name or "", out)
            if kept == results:
                write_everything(results, readme, [out.stem])
                print(f"wrote {results / out.stem}.json, .md and .svg", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
