"""The standard health check, from outside."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def probe(channel: grpc.Channel, timeout_s: float, service: str = "") -> bool:
    """Whether the server says that it serves. False too if it says nothing within the time.

    service: "ochredb.proto.v1.Log" for one; empty: the process as a whole.
    """
    stub: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        reply = stub.Check(request, timeout=timeout_s)
    except grpc.RpcError:
        return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
