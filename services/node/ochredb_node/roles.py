"""The roles that a process may have."""

from __future__ import annotations

import enum


class Role(enum.Enum):
    """The value is its name on the command line."""

    FRONTEND = "frontend"
    LOG = "log"
    QUERY = "query"
    COMPACTOR = "compactor"


ALL_ROLES = frozenset(Role)


def parse_roles(text: str) -> frozenset[Role]:
    """Of names between commas. Raises ValueError, whose text says what would be right."""
    known = [role.value for role in Role]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown role {name!r}; known are {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"a role is named twice in {text!r}")
    return frozenset(map(Role, names))


def names_of(roles: frozenset[Role]) -> str:
    """The same text again, always in one order."""
    return ",".join(role.value for role in Role if role in roles)
