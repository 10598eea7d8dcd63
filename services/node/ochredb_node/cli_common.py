"""What the subcommands share: exit statuses, how a failure is told, the token of a server."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

USAGE_ERROR, FAILURE = 2, 1


def start_failed(error: Exception) -> int:
    """Tell why a process did not start; the status says whether only other settings would help."""
    from ochredb.errors import InvalidArgument

    return failed(error, USAGE_ERROR if isinstance(error, InvalidArgument) else FAILURE)


def failed(reason: object, status: int) -> int:
    """Tell why on standard error; returns the status."""
    if isinstance(reason, OSError) and reason.filename is None:
        reason = reason.strerror or reason  # Without the number, which says nothing more.
    print(f"ochredb: {reason}", file=sys.stderr)
    return status


def add_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token", help="token of the server; prefer OCHREDB_TOKEN: flags are visible to others"
    )


def token_headers(options: dict[str, Any]) -> dict[str, str] | None:
    """The headers with which a server lets these options in; None without a token."""
    token = options["token"] or os.environ.get("OCHREDB_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else None
