"""URLs that may hold a password."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit

HIDDEN = "***"
_SECRET_PARAMETERS = ("password", "sslpassword", "passfile")


def without_password(url: str) -> str:
    """The URL fit to be shown: `***` for a password, before the host or among the parameters."""
    parts = urlsplit(url)
    place = parts.netloc
    if parts.password is not None:
        place = f"{parts.username or ''}:{HIDDEN}@{place.rpartition('@')[2]}"
    query = parts.query
    given = parse_qsl(query, keep_blank_values=True)
    if any(name in _SECRET_PARAMETERS for name, _ in given):
        shown = [(name, HIDDEN if name in _SECRET_PARAMETERS else value) for name, value in given]
        query = urlencode(shown, safe="*/:,")
    # (`urlunsplit` drops the slashes of an empty host.)
    return f"{parts.scheme}://{place}{parts.path}" + (f"?{query}" if query else "")
