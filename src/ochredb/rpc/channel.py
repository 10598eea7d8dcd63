"""A connection to one address; cheap to make, connects when it is first used."""

from __future__ import annotations

import grpc

from ochredb.errors import Unavailable
from ochredb.rpc.config import RpcConfig


def channel(address: str, config: RpcConfig) -> grpc.Channel:
    """address: "host:port". Its calls fail at once while nobody listens there; it reconnects.

    Nothing is repeated by itself, nothing goes through a proxy. Certificates are read here: a
    channel that shall show renewed ones is made anew (`tls.ClientFiles`). Raises Unavailable if
    they cannot be read.
    """
    options: list[tuple[str, str | int]] = [
        *connection_options(config),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # In spite of its name, how long one attempt may take at least.
        ("grpc.min_reconnect_backoff_ms", int(config.connect_timeout_s * 1e3)),
        ("grpc.max_reconnect_backoff_ms", int(config.reconnect_s_max * 1e3)),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        ("grpc.service_config_disable_resolution", 1),
        # A connection of its own, so that closing it closes it.
        ("grpc.use_local_subchannel_pool", 1),
        # Answers in several messages are read by the caller's own thread.
        ("SingleThreadedUnaryStream", 1),
    ]
    if not config.has_tls:
        return grpc.insecure_channel(address, options)
    if config.tls_server_name is not None:
        options.append(("grpc.ssl_target_name_override", config.tls_server_name))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=read_pem(config.tls_ca_path),
        private_key=read_pem(config.tls_key_path),
        certificate_chain=read_pem(config.tls_cert_path),
    )
    return grpc.secure_channel(address, credentials, options)


def connection_options(config: RpcConfig) -> list[tuple[str, str | int]]:
    """What both sides of a connection agree on."""
    keepalive_timeout_ms = int(config.keepalive_timeout_s * 1e3)
    return [
        ("grpc.keepalive_time_ms", int(config.keepalive_s * 1e3)),
        ("grpc.keepalive_timeout_ms", keepalive_timeout_ms),
        # Another ping, of which keepalive waits for the end; a minute by default.
        ("grpc.http2.ping_timeout_ms", keepalive_timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_send_message_length", config.message_bytes_max),
        ("grpc.max_receive_message_length", config.message_bytes_max),
    ]


def read_pem(path: str | None) -> bytes | None:
    """Raises Unavailable that names the file: it may be in the course of being replaced."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        text = f"the TLS file {path} cannot be read: {error.strerror}"
        raise Unavailable(text, unreachable=True) from error
