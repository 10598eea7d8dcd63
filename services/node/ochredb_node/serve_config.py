"""What the settings of `ochredb serve` mean for a node."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from ochredb.errors import InvalidArgument
from ochredb.hints.limits import LimitsConfig
from ochredb_node.config import NodeConfig
from ochredb_node.roles import Role
from ochredb_node.serve_settings import ServeSettings
from ochredb_node.settings import SettingsError

if TYPE_CHECKING:
    from ochredb.catalog.postgres_config import PostgresConfig
    from ochredb.hints.link import RedisConfig
    from ochredb.rpc.config import RpcConfig
    from ochredb.storage.s3_config import S3Config

_REMOTE_READ_THREADS = 64  # They mostly wait for other processes.
_S3_GRACE_S = 600.0
_ANY = ("0.0.0.0", "::")  # Listens on all addresses: which one others use is not known.


def in_cluster(config: NodeConfig, settings: ServeSettings) -> NodeConfig:
    """config: what the settings mean that `ochredb run` has too. Raises SettingsError."""
    roles = settings.role_set
    frontend = config.frontend
    grace_s = settings.gc_grace_s
    if grace_s is None:
        least_s = config.compactor.grace_s if settings.object_store_url is None else _S3_GRACE_S
        grace_s = max(least_s, 2 * settings.deadline_s)
    compactor = replace(
        config.compactor, memory_bytes=settings.compactor_memory_bytes, grace_s=grace_s
    )
    if settings.read_threads is None and Role.QUERY not in roles:
        frontend = replace(frontend, read_threads=_REMOTE_READ_THREADS)
    is_all_elsewhere = None not in (settings.catalog_url, settings.object_store_url)
    return replace(
        config,
        path=None if is_all_elsewhere else settings.path,
        roles=roles,
        name=settings.node_name or _name(settings),
        compactor_workers=settings.worker_count,
        catalog_url=settings.catalog_url,
        postgres=_postgres(settings),
        s3=_s3(settings),
        cache_path=os.path.join(settings.cache_path or f"{settings.path}/cache", "node"),
        cache_bytes=settings.cache_bytes // (1 + settings.worker_count),
        redis=_redis(settings),
        limits=LimitsConfig(
            requests_per_second=settings.requests_per_second,
            requests_burst=settings.requests_burst,
            concurrent_requests=settings.concurrent_requests,
        ),
        rpc=_rpc(settings),
        log_nodes=settings.log_nodes,
        query_nodes=settings.query_nodes,
        compactor_nodes=settings.compactor_nodes,
        frontend=frontend,
        query=replace(
            config.query,
            memory_bytes=settings.query_memory_bytes,
            spread_bytes=settings.spread_bytes,
        ),
        compactor=compactor,
    )


def _postgres(settings: ServeSettings) -> PostgresConfig | None:
    if settings.catalog_url is None:
        return None
    from ochredb.catalog.postgres_config import PostgresConfig

    try:
        return PostgresConfig(
            schema=settings.catalog_schema,
            connections_max=settings.catalog_connections,
        )
    except InvalidArgument as error:
        raise SettingsError(f"catalog_schema: {error}") from None


def _s3(settings: ServeSettings) -> S3Config | None:
    if settings.object_store_url is None:
        return None
    from ochredb.storage.s3_config import S3Config

    try:
        return S3Config.from_url(
            settings.object_store_url,
            endpoint_url=settings.s3_endpoint,
            region=settings.s3_region,
            access_key_id=settings.s3_access_key_id,
            secret_access_key=settings.s3_secret_access_key,
            session_token=settings.s3_session_token,
            addressing=settings.s3_addressing,
            encryption=settings.s3_encryption,
            kms_key_id=settings.s3_kms_key_id,
            ca_bundle=settings.s3_ca_path,
        )
    except InvalidArgument as error:
        raise SettingsError(f"object_store_url: {error}") from None


def _name(settings: ServeSettings) -> str:
    """As other nodes call this one, where that can be told."""
    kind, _, rest = (settings.query_nodes or "").partition(":")
    if kind == "dns" and Role.QUERY in settings.role_set and settings.rpc_host not in _ANY:
        from ochredb.cluster.membership import address_of

        return address_of(settings.rpc_host, int(rest.rpartition(":")[2]))
    return socket.gethostname()


def _redis(settings: ServeSettings) -> RedisConfig | None:
    if settings.redis_url is None:
        return None
    from ochredb.hints.link import RedisConfig

    return RedisConfig(url=settings.redis_url)


def _rpc(settings: ServeSettings) -> RpcConfig:
    from ochredb.rpc.config import RpcConfig

    return RpcConfig(
        host=settings.rpc_host,
        port=settings.rpc_port,
        token=settings.rpc_token,
        tls_cert_path=settings.rpc_tls_cert_path,
        tls_key_path=settings.rpc_tls_key_path,
        tls_ca_path=settings.rpc_tls_ca_path,
        tls_server_name=settings.rpc_tls_server_name,
    )
