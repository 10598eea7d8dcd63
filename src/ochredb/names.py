"""The names of tenants, databases and collections: what is allowed, and what a refusal says.

A database or collection name is 3 to 512 characters of [a-zA-Z0-9._-] that start and end with a
letter or digit, without two periods in a row, and not an IPv4 address. One `+` may separate a
topology from the name proper; then each side obeys the rule and both together fit 512 characters.
Official clients match the wording of these messages.
"""

from __future__ import annotations

import ipaddress
import re

from ochredb.errors import InvalidArgument

NAME_LENGTH_MAX = 512
TENANT_LENGTH_MIN = 3

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,510}[a-zA-Z0-9]")


def name_problem(name: str) -> str | None:
    """Why `name` is no name of a database or collection, or None."""
    sides = name.split("+")
    if len(sides) > 1:
        # Chroma counts bytes here; names that pass are ASCII, so only the message can tell.
        length = len(name.encode("utf-8", "surrogatepass"))
        if length > NAME_LENGTH_MAX:
            return f"Expected a name containing 3-512 characters. Got: {length}"
        if len(sides) > 2:
            return "Expected a name to contain at most one topology:  Got two `+` characters."
    for side in sides:
        if (problem := _side_problem(side)) is not None:
            return problem
    return None


def _side_problem(side: str) -> str | None:
    if _NAME.fullmatch(side) is None:
        return (
            "Expected a name containing 3-512 characters from [a-zA-Z0-9._-], starting and ending "
            f"with a character in [a-zA-Z0-9]. Got: {side}"
        )
    if ".." in side:
        return f"Expected a name that does not contains two consecutive periods (..). Got {side}"
    if _is_ip_address(side):
        return f"Expected a name that is not a valid ip address. Got {side}"
    return None


def _is_ip_address(text: str) -> bool:
    # An IPv6 address has colons, which the character set has refused already.
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def validate_collection_name(name: str, field: str = "name") -> None:
    """Raise InvalidArgument if `name` cannot name a collection. `field`: `name` or `new_name`."""
    if (problem := name_problem(name)) is not None:
        raise InvalidArgument(f"Validation error: {field}: {problem}")


def validate_database_name(name: str) -> None:
    """Raise InvalidArgument if `name` cannot name a database."""
    if (problem := name_problem(name)) is not None:
        raise InvalidArgument(problem)


def validate_tenant_name(name: str) -> None:
    """Raise InvalidArgument if `name` has fewer than 3 characters."""
    if len(name) < TENANT_LENGTH_MIN:
        raise InvalidArgument(
            f"Validation error: name: Expected a name of at least {TENANT_LENGTH_MIN} characters. "
            f"Got: {name}"
        )
