"""Where the command line's settings come from: flag > environment > configuration file > default.

One table; flags, `OCHREDB_*` variables and keys of the TOML file have the same names.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

ENVIRONMENT_PREFIX = "OCHREDB_"
_LOG_LEVELS = ("debug", "info", "warning", "error")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class SettingsError(Exception):
    """A setting is wrong; the text says which, where it came from and what would be right."""


def _setting(default: Any, help_text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `ochredb run` may be told."""

    path: str = _setting("./ochredb-data", "directory of the data; created if absent")
    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8000, "port to listen on; 0 takes a free one")
    allow_reset: bool = _setting(False, "let clients delete everything with POST /api/v2/reset")
    token: str | None = _setting(
        None, "token that every client must send; prefer OCHREDB_TOKEN: flags are visible to others"
    )
    insecure: bool = _setting(False, "listen beyond this machine without a token")
    log_level: str = _setting("info", "debug, info, warning or error", choices=_LOG_LEVELS)
    deadline_s: float = _setting(30.0, "seconds after which a request is given up (504)")
    slow_request_s: float = _setting(1.0, "seconds from which on a request is logged as slow")
    read_threads: int | None = _setting(None, "threads for reads (default: one per CPU)")
    write_threads: int | None = _setting(None, "threads for writes (default: 8, or one per CPU)")
    target_recall: float = _setting(
        0.95, "share of the true nearest that a graph shall find; 0: what ef_search gives"
    )

    pause_compaction: bool = _setting(
        False, "fold and merge nothing in the background: writes get 429 once a backlog is full"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port must be 0 to 65535, not {self.port}")
        if self.log_level not in _LOG_LEVELS:
            raise SettingsError(f"log_level must be one of {', '.join(_LOG_LEVELS)}")
        if not self.path:
            raise SettingsError("path must not be empty")
        for name in ("deadline_s", "slow_request_s"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.target_recall < 1:
            raise SettingsError(
                f"target_recall must be at least 0 and below 1, not {self.target_recall}"
            )
        for name in ("read_threads", "write_threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.token is not None and not (
            self.token and self.token.isascii() and self.token.isprintable()
        ):
            raise SettingsError("token must be one or more printable ASCII characters")
        if self.token is None and not self.insecure and not is_loopback(self.host):
            raise SettingsError(
                f"listening on {self.host} lets other machines in: set a token (--token, or better"
                " OCHREDB_TOKEN), or say --insecure if the network keeps strangers out"
            )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # Another name: it may resolve to any address.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting. Flags that are not given leave no trace in the result."""
    for setting in fields(Settings):
        flag = "--" + setting.name.replace("_", "-")
        shown = setting.metadata["help"]
        if setting.default not in (None, False):
            shown += f" (default: {setting.default})"
        if setting.type == "bool":
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=shown
            )
        else:
            parser.add_argument(
                flag, type=_converter(str(setting.type)), default=argparse.SUPPRESS, help=shown,
                choices=setting.metadata.get("choices"), metavar=setting.name.upper(),
            )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", default=None, help="TOML file with the same names as the flags"
    )


def load(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from parsed flags (only those given) and the environment. Raises SettingsError."""
    flags = dict(flags)
    config_path = flags.pop("config", None) or environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    values: dict[str, Any] = {} if config_path is None else _from_file(config_path)
    for setting in fields(Settings):
        name = ENVIRONMENT_PREFIX + setting.name.upper()
        text = environment.get(name)
        if text is not None and text != "":
            values[setting.name] = _from_text(name, text, str(setting.type))
    values.update(flags)
    return Settings(**values)


def _from_file(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"config file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"config file {path}: {error}") from None
    known = {setting.name: str(setting.type) for setting in fields(Settings)}
    for name, value in values.items():
        if name not in known:
            raise SettingsError(
                f"config file {path}: unknown setting {name}; known are {', '.join(known)}"
            )
        expected = known[name].split(" | ")[0]
        if expected == "float" and type(value) is int:
            values[name] = float(value)
        elif type(value).__name__ != expected:
            raise SettingsError(f"config file {path}: {name} must be of type {expected}")
    return values


def _from_text(name: str, text: str, kind: str) -> Any:
    if kind == "bool":
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
        raise SettingsError(f"{name} must be true or false, not {text!r}")
    try:
        return _converter(kind)(text)
    except ValueError:
        raise SettingsError(f"{name} must be a number, not {text!r}") from None


def _converter(kind: str) -> type[int] | type[float] | type[str]:
    names: Sequence[tuple[str, type[int] | type[float] | type[str]]]
    names = (("int", int), ("float", float), ("str", str))
    return next(converter for name, converter in names if kind.startswith(name))
