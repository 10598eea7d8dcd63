"""The vacuums of this process: one at a time, in a thread of its own, asked how far it is."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from ochredb.errors import AlreadyExists, NotFound, OchreError
from ochredb.vacuum import Phase, VacuumState
from ochredb_compactor.vacuum import Surroundings, Vacuum

log = logging.getLogger("ochredb.compactor")


class _Cancelled(Exception):
    """Somebody asked for it, or the process closes; what was done stays done."""


class VacuumService:
    """`ochredb.vacuum.Vacuums` in this process. Thread-safe."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._around = surroundings
        self._lock = threading.Lock()  # Guards beginning one.
        self._state: VacuumState | None = None
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()

    def start(self, *, purge: bool) -> VacuumState:
        with self._lock:
            if self._state is not None and self._thread is not None and self._thread.is_alive():
                raise AlreadyExists(f"vacuum {self._state.id} is running")
            state = VacuumState(id=self._around.world.ids.uuid7(), purge=purge)
            self._cancelled = threading.Event()
            thread = threading.Thread(
                target=self._run, args=(state, self._cancelled), name="vacuum", daemon=True
            )
            self._state, self._thread = state, thread
            thread.start()
            return state

    def state(self, vacuum_id: str) -> VacuumState:
        state = self._state
        if state is None or state.id != vacuum_id:
            raise NotFound(f"vacuum [{vacuum_id}] does not exist, or was followed by another")
        return state

    def cancel(self, vacuum_id: str) -> VacuumState:
        with self._lock:
            state = self.state(vacuum_id)
            self._cancelled.set()
            return state

    def stop(self) -> None:
        """End it, if one is running, and wait for that."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, state: VacuumState, cancelled: threading.Event) -> None:
        def progress(phase: Phase, done: float, total: float) -> None:
            self._state = replace(state, phase=phase, done=done, total=total)

        def step() -> None:
            if cancelled.is_set():
                raise _Cancelled

        try:
            report = Vacuum(self._around, purge=state.purge, progress=progress, step=step).run()
        except _Cancelled:
            self._state = replace(state, state="cancelled", error="somebody asked for it")
        except OchreError as error:
            log.warning("the vacuum failed: %s", error)
            self._state = replace(state, state="failed", error=str(error))
        except Exception as error:
            log.exception("the vacuum failed")
            self._state = replace(state, state="failed", error=f"{type(error).__name__}: {error}")
        else:
            self._state = replace(state, state="done", report=report)
