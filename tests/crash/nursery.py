"""A process that has imported everything and opened nothing, and forks others to order.

So a process is at work some milliseconds after its order, where one started anew would take a
second to import. `Nursery` is who orders; `serve` is the process itself. Orders and answers are
lines of JSON: kills and waits happen where the children are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ochredb.testing.server_process import ONE_THREAD


class Nursery:
    """`python -m module`, which calls `serve`. Thread-safe.

    environ: more variables, for it and its children.
    """

    def __init__(self, module: str, log: str, environ: Mapping[str, str] | None = None) -> None:
        self._lock, self._log = threading.Lock(), log
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **ONE_THREAD, **(environ or {})},
                cwd=Path(__file__).resolve().parents[2],
            )

    def ask(self, **order: Any) -> dict[str, Any]:
        """Raises RuntimeError if the nursery has ended. The orders, by `do`:

        spawn (log, ...) -> pid; run (log, ...) -> code, when it has ended; kill (pid, signal);
        look -> ended: [[pid, code]].
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with self._lock:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(order) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            said = Path(self._log).read_text(errors="replace")
            raise RuntimeError(f"the nursery has ended ({process.wait()}): {said}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Kill whatever still runs."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended already.
            self._process.stdin.close()
        self._process.wait(timeout=60)
        if self._process.stdout is not None:
            self._process.stdout.close()


def serve(run: Callable[[dict[str, Any]], None]) -> None:
    """Read orders, answer each with one line; `run` is what a child does with its order."""
    gc.collect()
    gc.freeze()
    children: set[int] = set()
    for text in sys.stdin:
        order = json.loads(text)
        answer: dict[str, Any] = {}
        if order["do"] in ("spawn", "run"):
            pid = os.fork()
            if pid == 0:
                os._exit(_child(run, order))
            answer["pid"] = pid
            if order["do"] == "spawn":
                children.add(pid)
            else:
                answer["code"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        elif order["do"] == "kill":
            assert order["pid"] in children, "not a child that is still to be waited for"
            os.kill(order["pid"], getattr(signal, order["signal"]))
            if order["signal"] == "SIGKILL":
                children.discard(order["pid"])
                status = os.waitpid(order["pid"], 0)[1]
                answer["code"] = os.waitstatus_to_exitcode(status)
        else:
            ended = []
            for pid in sorted(children):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    children.discard(pid)
                    ended.append((pid, os.waitstatus_to_exitcode(status)))
            answer["ended"] = ended
        print(json.dumps(answer), flush=True)
    for pid in children:  # Whoever gave the orders is gone.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _child(run: Callable[[dict[str, Any]], None], order: dict[str, Any]) -> int:
    """What a forked process does; its exit status."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=log)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    try:
        run(order)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
