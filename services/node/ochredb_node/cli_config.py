"""`ochredb config`: the settings that `ochredb serve` would have, and where each came from."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from ochredb_node.cli_common import USAGE_ERROR, failed
from ochredb_node.serve_settings import ServeSettings
from ochredb_node.settings import Loaded, SettingsError, load_table
from ochredb_node.urls import HIDDEN, without_password


def run(options: dict[str, Any]) -> int:
    """Returns the exit status: 0, 2 for bad settings."""
    if options.pop("reference"):
        print(reference())
        return 0
    try:
        loaded = load_table(ServeSettings, options)
    except SettingsError as error:
        return failed(error, USAGE_ERROR)
    print(effective(loaded))
    return 0


def effective(loaded: Loaded[ServeSettings]) -> str:
    """TOML with a line for each setting; what is not set is a comment."""
    lines = []
    for one in fields(ServeSettings):
        value = getattr(loaded.settings, one.name)
        source = loaded.sources[one.name]
        if value is None:
            lines.append(f"# {one.name} is not set")
            continue
        if one.metadata.get("secret"):
            value = without_password(value) if "://" in value else HIDDEN
        lines.append(f"{one.name} = {_toml(value)}  # {source}")
    return "\n".join(lines)


def reference() -> str:
    """A Markdown table of all settings, as docs/operations.md has it."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for one in fields(ServeSettings):
        default = "" if one.default is None else f"`{_toml(one.default)}`"
        secret = " *Secret.*" if one.metadata.get("secret") else ""
        meaning = one.metadata["help"].replace("|", "\\|") + "." + secret
        lines.append(f"| `{one.name}` | {default} | {meaning} |")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """Strings of JSON are strings of TOML, but for what is beyond 16 bits, which is left as is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
