"""Imports what any process of a cluster may need, and opens nothing: for the nursery."""

from __future__ import annotations

import importlib
import pkgutil

_PACKAGES = (
    *("ochredb", "ochredb_frontend", "ochredb_log", "ochredb_query", "ochredb_compactor"),
    "ochredb_node",
)
_LIBRARIES = (
    "boto3",
    "grpc",
    "psycopg",
    "redis",
    "uvicorn",
    "grpc_health.v1.health",
)
_SKIPPED = ("testing", "migrations", "__main__")


def preload() -> None:
    for name in _LIBRARIES:
        importlib.import_module(name)
    for name in _PACKAGES:
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not any(part in _SKIPPED for part in found.name.split(".")):
                importlib.import_module(found.name)
