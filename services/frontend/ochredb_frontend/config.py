"""What an operator may set about the REST role. Data only; the command line fills it in."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


def _cpu_count() -> int:
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendConfig:
    """Limits, deadlines and threads of the REST role. Raises ValueError on nonsense."""

    allow_reset: bool = False
    token: str | None = None  # If set, every request but health checks and documents needs it.
    default_tenant: str = "default_tenant"
    default_database: str = "default_database"

    # Limits on one request; each is refused with a message that names it. Those on filters are in
    # `ochredb.where_parse`.
    batch_records_max: int = 100_000  # Published as max_batch_size.
    body_bytes_max: int = 40 * 1024 * 1024
    results_max: int = 1_000_000  # n_results times the number of query vectors.

    # Time.
    deadline_s: float = 30.0  # Then 504.
    slow_request_s: float = 1.0  # Slower requests are logged.
    disconnect_check_s: float = 0.1  # From here on, a client that goes away cancels its request.

    # Threads: reads and writes have their own, so blocked writes never starve queries.
    read_threads: int = field(default_factory=_cpu_count)
    # Of large writes, and of deletions by filter. They mostly wait for a commit that they share, so
    # more threads than CPUs make larger flushes.
    write_threads: int = field(default_factory=lambda: max(8, _cpu_count()))
    queue_max: int = 256  # Requests that wait for a thread, per pool; beyond it 429.
    inline_body_bytes_max: int = 64 * 1024  # Larger bodies are never parsed on the event loop.
    inline_write_bytes_max: int = 32 * 1024  # The same for writes, which are encoded there too.

    def __post_init__(self) -> None:
        for name in (
            "batch_records_max", "body_bytes_max", "results_max", "read_threads",
            "write_threads", "queue_max",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.deadline_s <= 0:
            raise ValueError(f"deadline_s must be above 0, not {self.deadline_s}")
        if self.token is not None and (not self.token.isascii() or not self.token.isprintable()):
            raise ValueError("token must be printable ASCII")
        if self.token == "":
            raise ValueError("token must not be empty; leave it out to serve without one")
