"""Compare our server with the official one: start both fresh, measure in one run, keep the result.

    .venv/bin/python bench/run.py --name 2026-11-20-quick -- --quick

What follows `--` goes to peer_bench as it is. A is ours, B the official server, out of the
environment .venv-peer that `make .venv-peer` builds. Writes results/NAME.json (everything),
NAME.md (the table and the circumstances) and NAME.svg (the picture).
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import orjson
from peer_bench.report import table
from picture import draw

from ochredb.testing.server_process import HOST, ServerProcess, free_port, ochredb_server

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-peer" / "bin" / "chroma"
LABELS = ["OchreDB", "Chroma 1.5.9"]


def peer_server(directory: Path) -> ServerProcess:
    """Return the official server, not yet started, with its data under `directory`/data."""
    port = free_port()
    directory.mkdir()
    configuration = directory / "config.yaml"
    configuration.write_text(
        f'port: {port}\nlisten_address: "{HOST}"\n'
        f'persist_path: "{directory / "data"}"\nallow_reset: true\n'
    )
    command = [str(PEER), "run", str(configuration)]
    return ServerProcess(command, port, directory / "server.log")


def measure(name: str, results: Path, more: list[str]) -> int:
    """Run peer_bench against both servers; return its exit code."""
    with tempfile.TemporaryDirectory(prefix="ochredb_bench_") as scratch:
        ours_directory, peer_directory = Path(scratch) / "ours", Path(scratch) / "peer"
        ours, peer = ochredb_server(ours_directory), peer_server(peer_directory)
        with ours, peer:
            command = [sys.executable, "-m", "peer_bench", "--out", str(results / f"{name}.json")]
            for key, server, label, directory in (
                ("a", ours, LABELS[0], ours_directory),
                ("b", peer, LABELS[1], peer_directory / "data"),
            ):
                command += [f"--{key}", server.url, f"--label-{key}", label]
                command += [f"--pid-{key}", str(server.pid), f"--data-{key}", str(directory)]
            done = subprocess.run(
                [*command, *more], cwd=HERE, stdin=subprocess.DEVNULL, check=False
            )
        if done.returncode or ours.returncode:
            print(ours.output_tail(), peer.output_tail(), sep="\n")
    return done.returncode or ours.returncode or 0


def write_up(name: str, results: Path) -> None:
    """Write the markdown table and the picture beside the JSON result."""
    result = orjson.loads((results / f"{name}.json").read_bytes())
    arguments, measured = result["args"], result["metrics"]
    lines = [
        f"# {name}: {LABELS[0]} beside {LABELS[1]}",
        "",
        f"{arguments['n']} records, one run, slices alternating between the two servers on one "
        f"machine: {result['cpus']} CPUs ({processor()}), Python {platform.python_version()}, "
        f"load average {result['load_before'][0]:.1f} before and {result['load_after'][0]:.1f} "
        f"after, {result['wall_s']:.0f} s in all.",
        "",
        f"![ratio per operation]({name}.svg)",
        "",
    ]
    for dim in result["dims"]:
        rows = [one for one in measured if one["dim"] == int(dim)]
        lines += [f"## {arguments['n']} x {dim} dimensions", "", table(rows, LABELS), ""]
    (results / f"{name}.md").write_text("\n".join(lines))
    title = f"{LABELS[0]} against {LABELS[1]}: {arguments['n']:,} records, one machine"
    (results / f"{name}.svg").write_text(draw(measured, title, LABELS))


def processor() -> str:
    """Return the processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--name", required=True, help="name of the result's files")
    p.add_argument("--results", type=Path, default=HERE / "results")
    p.add_argument("--write-up-only", action="store_true", help="from an existing JSON result")
    options, more = p.parse_known_args()
    if not PEER.exists() and not options.write_up_only:
        p.error(f"{PEER} is missing: run `make .venv-peer`")
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    if not options.write_up_only:
        if os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1):
            print("warning: the machine is busy; ratios of wall time will be noisy")
        code = measure(options.name, results, [one for one in more if one != "--"])
        if code:
            return code
    write_up(options.name, results)
    print(f"wrote {results / options.name}.json, .md and .svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
