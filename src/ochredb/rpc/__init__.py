"""The roles' calls between processes: gRPC, as docs/formats/rpc.md says.

Clients implement the interfaces of `ochredb.peers` for one address; servicers, in the packages of
their roles, offer whatever implements them. Where all roles share a process nothing here is
imported. Where the packages of gRPC are missing, importing it raises InvalidArgument.
"""

from __future__ import annotations

from importlib import import_module

from ochredb.errors import InvalidArgument

try:
    for _package in ("google.protobuf", "grpc", "grpc_health", "grpc_reflection"):
        import_module(_package)
except ImportError as error:
    raise InvalidArgument(
        f"calls between processes need gRPC: pip install 'ochredb[cluster]' ({error})"
    ) from error
