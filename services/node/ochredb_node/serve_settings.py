"""The settings of `ochredb serve`: those of `ochredb run`, and what joins processes to a cluster.

Everything that can be seen to be wrong without looking at another machine is refused here.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, fields
from urllib.parse import urlsplit

from ochredb.catalog.repeats import NAMES_KEPT_S
from ochredb_node.roles import ALL_ROLES, Role, parse_roles
from ochredb_node.settings import (
    Settings,
    SettingsError,
    check_above_0,
    check_at_least,
    check_port,
    check_token,
    is_loopback,
    setting,
)

# A write is repeated until its deadline, and known by its name for twice as long.
_DEADLINE_S_MAX = NAMES_KEPT_S / 2
_ALL = "frontend,log,query,compactor"
_NODES_FORMS = "static:NAME=HOST:PORT,... or dns:HOST:PORT or kubernetes:SERVICE:PORT"
_NODES = re.compile(
    r"static:[^=,\s]+=[^=,\s]+:\d+(,[^=,\s]+=[^=,\s]+:\d+)*|dns:\S+:\d+|kubernetes:\S+:\S+"
)
_MIB = 1 << 20
_URLS = (
    ("catalog_url", ("postgresql", "postgres"), "postgresql://USER@HOST:PORT/DATABASE"),
    ("object_store_url", ("s3",), "s3://BUCKET/PREFIX"),
    ("s3_endpoint", ("http", "https"), "https://HOST:PORT"),
    ("redis_url", ("redis", "rediss", "unix"), "redis://HOST:PORT"),
)
_WITH_PASSWORD = ("catalog_url", "redis_url")  # Not shown.
_ADDRESSING, _ENCRYPTION = ("auto", "path", "virtual"), ("AES256", "aws:kms")
_BY_SOCKET = ("postgresql", "postgres", "unix")  # The host may be the path of a socket.
_OWNERS = {"log_nodes": Role.LOG, "query_nodes": Role.QUERY}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings(Settings):
    """What `ochredb serve` may be told."""

    roles: str = setting(_ALL, "what this process does: names between commas")
    node_name: str | None = setting(
        None,
        "stable name of this process among its peers (default: the host's; with dns: its address)",
    )

    catalog_url: str | None = setting(
        None, "postgresql://USER:PASSWORD@HOST:PORT/DATABASE (default: SQLite in path)", secret=True
    )
    catalog_schema: str = setting("public", "schema of its tables; one for each deployment")
    catalog_connections: int = setting(
        16, "most connections to it, for reads and for writes each, of one process"
    )
    object_store_url: str | None = setting(
        None, "s3://BUCKET/PREFIX (default: the directory objects in path)"
    )
    s3_endpoint: str | None = setting(None, "URL of an S3-compatible store (default: AWS)")
    s3_region: str | None = setting(None, "region of the bucket (default: as boto3 finds it)")
    s3_access_key_id: str | None = setting(None, "key id for S3 (default: as boto3 finds it)")
    s3_secret_access_key: str | None = setting(None, "secret key for S3", secret=True)
    s3_session_token: str | None = setting(
        None, "session token for S3, if the key is a temporary one", secret=True
    )
    s3_addressing: str = setting(
        "auto", "auto, path or virtual: where the bucket is in URLs", choices=_ADDRESSING
    )
    s3_encryption: str | None = setting(
        None, "AES256 or aws:kms: how the store encrypts what is put there", choices=_ENCRYPTION
    )
    s3_kms_key_id: str | None = setting(None, "key for aws:kms (default: the account's own)")
    s3_ca_path: str | None = setting(None, "who signs the store's certificate (PEM)")
    cache_path: str | None = setting(
        None, "directory for this process's copies of objects in S3 (default: cache in path)"
    )
    cache_bytes: int = setting(10 << 30, "most bytes that those copies may take")
    redis_url: str | None = setting(
        None, "redis://HOST:PORT for hints between processes (default: they poll)", secret=True
    )

    rpc_host: str = setting("127.0.0.1", "address on which log, query and compactor listen")
    rpc_port: int = setting(8100, "port on which they listen; 0 takes a free one")
    rpc_token: str | None = setting(
        None, "token that processes of the cluster send one another", secret=True
    )
    rpc_tls_cert_path: str | None = setting(None, "certificate (PEM): gRPC then uses TLS")
    rpc_tls_key_path: str | None = setting(None, "its private key (PEM)")
    rpc_tls_ca_path: str | None = setting(
        None, "who signs the cluster's certificates (PEM): then both sides must have one"
    )
    rpc_tls_server_name: str | None = setting(
        None, "name in the other processes' certificates, where they are addressed otherwise"
    )
    log_nodes: str | None = setting(None, f"where the log nodes are: {_NODES_FORMS}")
    query_nodes: str | None = setting(None, "where the query nodes are, likewise")
    compactor_nodes: str | None = setting(
        None,
        "where the compactors are, likewise: query nodes ask them to mend damaged indexes, log"
        " nodes without Redis tell them of writes",
    )

    health_host: str = setting("127.0.0.1", "address for /healthz, /readyz and /metrics")
    health_port: int = setting(8200, "port for them; 0 takes a free one")
    drain_timeout_s: float = setting(
        30.0, "seconds that running requests get to finish after SIGTERM"
    )

    requests_per_second: float | None = setting(
        None, "most requests that each tenant may make in a second (default: no limit)"
    )
    requests_burst: float | None = setting(
        None, "so many of them may come at once after a pause (default: a second's)"
    )
    concurrent_requests: int | None = setting(
        None, "most requests of each tenant that may run at once (default: no limit)"
    )

    query_memory_bytes: int = setting(
        1 << 30, "memory for graphs, codes and tails of loaded collections"
    )
    spread_bytes: int = setting(
        1 << 30, "a larger collection's parts are spread over the query nodes"
    )
    compactor_workers: int | None = setting(
        None, "processes that compact; 0: threads of this one (default: CPUs - 1, at least 1)"
    )
    compactor_memory_bytes: int | None = setting(
        None, "memory for the jobs of one such process, about (default: whatever they need)"
    )
    gc_grace_s: float | None = setting(
        None,
        "an unreferenced object is kept so many seconds: at least twice deadline_s (default: 60;"
        " in S3 600)",
    )

    def __post_init__(self) -> None:
        try:
            roles = parse_roles(self.roles)
        except ValueError as error:
            raise SettingsError(f"roles: {error}") from None
        Settings.__post_init__(self)
        for name in ("rpc_port", "health_port"):
            check_port(self, name)
        check_above_0(self, "drain_timeout_s")
        if self.deadline_s > _DEADLINE_S_MAX:
            raise SettingsError(
                f"deadline_s must be at most {_DEADLINE_S_MAX:g}, not {self.deadline_s}"
            )
        check_at_least(self, 0, "compactor_workers")
        if self.gc_grace_s is not None and not self.gc_grace_s >= 2 * self.deadline_s:
            raise SettingsError(
                f"gc_grace_s must be at least twice deadline_s, {2 * self.deadline_s:g}, so that no"
                f" request outlives what it reads, not {self.gc_grace_s}"
            )
        check_at_least(self, 64 * _MIB, "cache_bytes")
        check_at_least(self, _MIB, "query_memory_bytes", "compactor_memory_bytes")
        check_at_least(self, 0, "spread_bytes")
        check_at_least(self, 1, "catalog_connections")
        check_at_least(self, 1, "requests_burst", "concurrent_requests")
        if self.requests_per_second is not None:
            check_above_0(self, "requests_per_second")
        check_token(self, "rpc_token")
        self._check_urls()
        self._check_peers(roles)
        self._check_tls()
        if roles - {Role.FRONTEND}:
            self._check_rpc_listens_safely()

    @property
    def role_set(self) -> frozenset[Role]:
        return parse_roles(self.roles)

    @property
    def serves_rest(self) -> bool:
        return Role.FRONTEND in parse_roles(self.roles)

    @property
    def serves_rpc(self) -> bool:
        return bool(self.role_set - {Role.FRONTEND})

    @property
    def worker_count(self) -> int:
        """Processes that compact for this one."""
        if Role.COMPACTOR not in self.role_set:
            return 0
        if self.compactor_workers is not None:
            return self.compactor_workers
        return max(1, (os.cpu_count() or 1) - 1)

    def _check_urls(self) -> None:
        for name, schemes, example in _URLS:
            url = getattr(self, name)
            if url is None:
                continue
            try:
                parts = urlsplit(url)
                has_place = bool(parts.netloc or (parts.path and parts.scheme in _BY_SOCKET))
                usable = parts.scheme in schemes and has_place
                _ = "," in parts.netloc or parts.port  # Of several hosts.
            except ValueError:
                usable = False
            if not usable:
                shown = "" if name in _WITH_PASSWORD else f", not {url!r}"
                raise SettingsError(f"{name} must be like {example}{shown}")
        if self.object_store_url is None:
            for one in fields(ServeSettings):
                if one.name.startswith("s3_") and getattr(self, one.name) != one.default:
                    raise SettingsError(f"{one.name} is given without object_store_url")
        if self.s3_addressing not in _ADDRESSING:
            raise SettingsError(f"s3_addressing must be one of {', '.join(_ADDRESSING)}")
        if self.s3_encryption not in (None, *_ENCRYPTION):
            raise SettingsError(f"s3_encryption must be one of {', '.join(_ENCRYPTION)}")
        if self.s3_kms_key_id is not None and self.s3_encryption != "aws:kms":
            raise SettingsError("s3_kms_key_id needs s3_encryption aws:kms")
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise SettingsError("s3_access_key_id and s3_secret_access_key go together")
        if self.s3_session_token is not None and self.s3_access_key_id is None:
            raise SettingsError("s3_session_token needs s3_access_key_id and s3_secret_access_key")

    def _check_peers(self, roles: frozenset[Role]) -> None:
        for name in ("log_nodes", "query_nodes", "compactor_nodes"):
            nodes = getattr(self, name)
            if nodes is not None and not _NODES.fullmatch(nodes):
                raise SettingsError(f"{name} must be {_NODES_FORMS}, not {nodes!r}")
        self._check_own_name(roles)
        if Role.FRONTEND in roles:
            for name, role in _OWNERS.items():
                if role not in roles and getattr(self, name) is None:
                    raise SettingsError(
                        f"roles has frontend but not {role.value}: say where those nodes are"
                        f" ({name}), or add the role"
                    )
        local = "SQLite catalog" if self.catalog_url is None else ""
        if self.object_store_url is None:
            local = f"{local} and a directory of objects" if local else "directory of objects"
        if local and roles != ALL_ROLES:
            for name in ("log_nodes", "query_nodes", "compactor_nodes"):
                if _beyond_this_machine(getattr(self, name)):
                    raise SettingsError(
                        f"{name} names other machines, which cannot share a {local} in"
                        f" {self.path}: set catalog_url and object_store_url"
                    )

    def _check_own_name(self, roles: frozenset[Role]) -> None:
        """A query node must know which of the nodes in a list it is."""
        kind, _, rest = (self.query_nodes or "").partition(":")
        if Role.QUERY not in roles or kind != "static":
            return
        names = [item.partition("=")[0] for item in rest.split(",")]
        name = self.node_name or socket.gethostname()
        if name not in names:
            raise SettingsError(
                f"query_nodes names {', '.join(names)}, and this query node is {name}: say which"
                " it is (node_name)"
            )

    def _check_tls(self) -> None:
        if (self.rpc_tls_cert_path is None) != (self.rpc_tls_key_path is None):
            raise SettingsError("rpc_tls_cert_path and rpc_tls_key_path go together")
        for name in ("rpc_tls_cert_path", "rpc_tls_key_path", "rpc_tls_ca_path", "s3_ca_path"):
            path = getattr(self, name)
            if path is None:
                continue
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                raise SettingsError(f"{name} {path}: {error.strerror}") from None
        if self.rpc_tls_cert_path or self.rpc_tls_ca_path or self.s3_ca_path:
            self._check_pem()

    def _check_pem(self) -> None:
        from ochredb.pem import check_authority, check_pair  # Late: OpenSSL.

        names = "rpc_tls_cert_path, rpc_tls_key_path"
        try:
            if self.rpc_tls_cert_path is not None and self.rpc_tls_key_path is not None:
                check_pair(self.rpc_tls_cert_path, self.rpc_tls_key_path)
            for names in ("rpc_tls_ca_path", "s3_ca_path"):
                if (path := getattr(self, names)) is not None:
                    check_authority(path)
        except ValueError as error:
            raise SettingsError(f"{names}: {error}") from None

    def _check_rpc_listens_safely(self) -> None:
        mutual = self.rpc_tls_cert_path is not None and self.rpc_tls_ca_path is not None
        if not (self.insecure or self.rpc_token or mutual or is_loopback(self.rpc_host)):
            raise SettingsError(
                f"gRPC on {self.rpc_host} lets other machines in: set a token (OCHREDB_RPC_TOKEN)"
                " or certificates (rpc_tls_cert_path, rpc_tls_key_path, rpc_tls_ca_path), or say"
                " --insecure if the network keeps strangers out"
            )


def _beyond_this_machine(nodes: str | None) -> bool:
    """Whether a list of nodes names other machines; a name in DNS or Kubernetes counts as one."""
    if nodes is None:
        return False
    kind, _, rest = nodes.partition(":")
    if kind != "static":
        return not (kind == "dns" and is_loopback(rest.rpartition(":")[0].strip("[]")))
    addresses = (item.rpartition("=")[2] for item in rest.split(","))
    return not all(is_loopback(one.rpartition(":")[0].strip("[]")) for one in addresses)
