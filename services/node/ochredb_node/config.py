"""What a node is to be: data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ochredb.catalog.appends import BacklogLimits
from ochredb.hints.limits import LimitsConfig
from ochredb.hints.link import RedisConfig
from ochredb_compactor.config import CompactorConfig
from ochredb_frontend.config import FrontendConfig
from ochredb_log.config import LogConfig
from ochredb_node.roles import ALL_ROLES, Role
from ochredb_query.config import QueryConfig

if TYPE_CHECKING:  # Of packages that the embedded engine does without.
    from ochredb.catalog.postgres_config import PostgresConfig
    from ochredb.rpc.config import RpcConfig
    from ochredb.storage.s3_config import S3Config


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """path: the store's directory; catalog and objects that are nowhere else are in it. None: they
        are in memory.

    roles: what this process does. Reads and writes of a frontend without the query or the log role
        go to the peers that the node is given.
    name: of this process among its peers, the same after a restart.
    compactor_workers: processes that compact for this one, which then only answers for them; 0: its
        own threads do.
    redis: where processes tell one another what is new; None: they look for themselves.
    foreground: an embedded writer whose backlog is full compacts by itself instead of getting 429.
    catalog_url: a catalog in PostgreSQL. postgres: how it is used.
    s3: the bucket that holds the objects; then cache_path is a directory for this process's local
        copies, of `cache_bytes` at most.
    log_nodes, query_nodes, compactor_nodes: where peers are; see `ochredb.cluster.membership`.
    """

    path: str | None = None
    roles: frozenset[Role] = ALL_ROLES
    name: str = "node"
    compactor_workers: int = 0
    foreground: bool = False
    catalog_url: str | None = field(default=None, repr=False)
    postgres: PostgresConfig | None = None
    s3: S3Config | None = None
    cache_path: str | None = None
    cache_bytes: int = 10 << 30
    rpc: RpcConfig | None = None
    log_nodes: str | None = None
    query_nodes: str | None = None
    compactor_nodes: str | None = None
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    log: LogConfig = field(default_factory=LogConfig)
    backlog: BacklogLimits = field(default_factory=BacklogLimits)
    query: QueryConfig = field(default_factory=QueryConfig)
    compactor: CompactorConfig = field(default_factory=CompactorConfig)
    redis: RedisConfig | None = None
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    @property
    def compacts(self) -> bool:
        """Whether threads of the process fold, merge and collect."""
        return Role.COMPACTOR in self.roles and self.compactor_workers == 0

    @property
    def hurries(self) -> bool:
        """Whether the process tells compactors elsewhere of writes; with Redis they hear there."""
        return Role.LOG in self.roles and not self.compacts and self.redis is None
