"""Settings of calls between processes: data only, for both sides."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcConfig:
    """What servers and clients of one cluster share.

    host, port: where a server listens; port 0 takes a free one.
    token: what every call must carry, if set.
    tls_cert_path, tls_key_path: PEM files; a server with both speaks TLS, a client shows them.
    tls_ca_path: PEM of the authorities that the other side's certificate must come from. A server
        that has it refuses clients without a certificate.
    tls_server_name: the name in servers' certificates, where addresses are not in them.
    message_bytes_max: 40 MiB of JSON may be 80 MiB of vectors.
    chunk_bytes: about the size of a message of a large answer.
    write_threads, read_threads, compactor_threads: calls that run at once on a server, by kind;
        as many shares of other nodes' reads as reads.
    waiting_max: calls of one kind that wait for a thread; more are refused (Exhausted).
    keepalive_s, keepalive_timeout_s: how often a silent peer is asked for a sign of life, and for
        how long it may owe it.
    connect_timeout_s: after which an attempt to connect has failed.
    reconnect_s_max: the longest pause between two attempts to connect.
    call_timeout_s: of calls whose caller set no deadline.
    evaluate_timeout_s: for how long a log stays locked while its writer evaluates.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = field(default=None, repr=False)
    tls_cert_path: str | None = None
    tls_key_path: str | None = None
    tls_ca_path: str | None = None
    tls_server_name: str | None = None
    message_bytes_max: int = 96 << 20
    chunk_bytes: int = 1 << 20
    write_threads: int = 32
    read_threads: int = 16
    compactor_threads: int = 4
    waiting_max: int = 256
    keepalive_s: float = 10.0
    keepalive_timeout_s: float = 5.0
    connect_timeout_s: float = 2.0
    reconnect_s_max: float = 1.0
    call_timeout_s: float = 30.0
    evaluate_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be 0 to 65535, not {self.port}")
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise ValueError("tls_cert_path and tls_key_path go together")
        if not 0 < self.chunk_bytes <= self.message_bytes_max // 2:
            raise ValueError("chunk_bytes must be above 0 and half of message_bytes_max at most")
        for name in (
            "write_threads", "read_threads", "compactor_threads", "waiting_max", "keepalive_s",
            "keepalive_timeout_s", "connect_timeout_s", "reconnect_s_max", "call_timeout_s",
            "evaluate_timeout_s",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.token is not None and not (
            self.token and self.token.isascii() and self.token.isprintable()
        ):
            raise ValueError("token must be one or more printable ASCII characters")

    @property
    def has_tls(self) -> bool:
        return self.tls_cert_path is not None or self.tls_ca_path is not None
