"""Where the command line's settings come from: flag > environment > configuration file > default.

A table is a frozen dataclass whose fields are the settings: this one is that of `ochredb run`,
`serve_settings` has the one of `ochredb serve`. Flags, `OCHREDB_*` variables and keys of the file
(TOML, or YAML by its ending) have the same names. A secret may also be given as the name of a file
that holds it, under its own name and `_file`.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

ENVIRONMENT_PREFIX = "OCHREDB_"
WORKER_VARIABLE = "OCHREDB_COMPACTOR_WORKER"  # Set by a process for those that compact for it.
READER_VARIABLE = "OCHREDB_READER_CHANNEL"  # Likewise, for those that read for it.
DEFAULT = "default"
_FILE_SUFFIX = "_file"
_YAML_ENDINGS = (".yaml", ".yml")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class SettingsError(Exception):
    """A setting is wrong; the text says which, where it came from and what would be right."""


def setting(default: Any, help_text: str, **more: Any) -> Any:
    """A field. more: choices; secret: never shown, and may be in a file of its own."""
    return field(default=default, repr=not more.get("secret"), metadata={"help": help_text, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `ochredb run` may be told."""

    path: str = setting("./ochredb-data", "directory of the data; created if absent")
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0 takes a free one")
    allow_reset: bool = setting(False, "let clients delete everything with POST /api/v2/reset")
    token: str | None = setting(
        None,
        "token that every client must send; prefer OCHREDB_TOKEN: flags are visible to others",
        secret=True,
    )
    insecure: bool = setting(False, "listen beyond this machine without a token")
    log_level: str = setting("info", "debug, info, warning or error", choices=_LOG_LEVELS)
    deadline_s: float = setting(30.0, "seconds after which a request is given up (504)")
    slow_request_s: float = setting(1.0, "seconds from which on a request is logged as slow")
    read_threads: int | None = setting(
        None, "threads for reads, and CPUs that `run` uses for them (default: one per CPU)"
    )
    write_threads: int | None = setting(None, "threads for writes (default: 8, or one per CPU)")
    target_recall: float = setting(
        0.95, "share of the true nearest that a graph shall find; 0: what ef_search gives"
    )
    pause_compaction: bool = setting(
        False, "fold and merge nothing in the background: writes get 429 once a backlog is full"
    )

    def __post_init__(self) -> None:
        check_port(self, "port")
        if self.log_level not in _LOG_LEVELS:
            raise SettingsError(f"log_level must be one of {', '.join(_LOG_LEVELS)}")
        if not self.path:
            raise SettingsError("path must not be empty")
        check_above_0(self, "deadline_s", "slow_request_s")
        if not 0 <= self.target_recall < 1:
            raise SettingsError(
                f"target_recall must be at least 0 and below 1, not {self.target_recall}"
            )
        check_at_least(self, 1, "read_threads", "write_threads")
        check_token(self, "token")
        if self.serves_rest and not (self.token or self.insecure or is_loopback(self.host)):
            raise SettingsError(
                f"listening on {self.host} lets other machines in: set a token (--token, or better"
                " OCHREDB_TOKEN), or say --insecure if the network keeps strangers out"
            )

    @property
    def serves_rest(self) -> bool:
        """Whether this process listens on `host` and `port`."""
        return True


def check_port(settings: Settings, name: str) -> None:
    port = getattr(settings, name)
    if not 0 <= port <= 65535:
        raise SettingsError(f"{name} must be 0 to 65535, not {port}")


def check_above_0(settings: Settings, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise SettingsError(f"{name} must be above 0, not {getattr(settings, name)}")


def check_at_least(settings: Settings, least: int, *names: str) -> None:
    """Of those that are set."""
    for name in names:
        if getattr(settings, name) is not None and not getattr(settings, name) >= least:
            raise SettingsError(f"{name} must be at least {least}, not {getattr(settings, name)}")


def check_token(settings: Settings, name: str) -> None:
    token = getattr(settings, name)
    if token is not None and not (token and token.isascii() and token.isprintable()):
        raise SettingsError(f"{name} must be one or more printable ASCII characters")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # Another name: it may resolve to any address.


_S = TypeVar("_S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[_S]):
    """Settings, and where each came from: a flag, a variable, a key in a file, or `DEFAULT`."""

    settings: _S
    sources: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser, table: type[Settings] = Settings) -> None:
    """One flag for each setting. Flags that are not given leave no trace in the result."""
    for one in fields(table):
        flag = _flag(one.name)
        shown = one.metadata["help"]
        if one.default not in (None, False):
            shown += f" (default: {one.default})"
        shown = shown.replace("%", "%%")
        if one.type == "bool":
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=shown
            )
        else:
            parser.add_argument(
                flag, type=_converter(str(one.type)), default=argparse.SUPPRESS, help=shown,
                choices=one.metadata.get("choices"), metavar=one.name.upper(),
            )  # fmt: skip
        if one.metadata.get("secret"):
            parser.add_argument(
                flag + "-file", dest=one.name + _FILE_SUFFIX, default=argparse.SUPPRESS,
                metavar="FILE", help=f"file that holds {one.name}",
            )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", default=None,
        help="TOML file with the same names as the flags; YAML if it ends in .yaml",
    )  # fmt: skip


def load(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """What `ochredb run` is told. Raises SettingsError."""
    return load_table(Settings, flags, environment).settings


def load_table(
    table: type[_S], flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> Loaded[_S]:
    """Settings from parsed flags (only those given), environment and file. Raises SettingsError."""
    flags = dict(flags)
    config_path = flags.pop("config", None) or environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    from_file = {} if config_path is None else _from_file(table, config_path)
    from_environment = {}
    for name, kind in _names(table).items():
        text = environment.get(_variable(name))
        if text is not None and text != "":
            from_environment[name] = _from_text(_variable(name), text, kind)
    values: dict[str, Any] = {}
    sources = {one.name: DEFAULT for one in fields(table)}
    places: tuple[tuple[Mapping[str, Any], Callable[[str], str]], ...] = (
        (from_file, lambda name: f"{name} in {config_path}"),
        (from_environment, _variable),
        (flags, _flag),
    )
    for given, named in places:
        for one in fields(table):
            if one.name in given:
                values[one.name], sources[one.name] = given[one.name], named(one.name)
            by_file = one.name + _FILE_SUFFIX
            if by_file in given and one.metadata.get("secret"):
                if one.name in given:
                    raise SettingsError(f"{named(one.name)} and {named(by_file)} are both given")
                values[one.name] = _secret(named(by_file), given[by_file])
                sources[one.name] = named(by_file)
    return Loaded(table(**values), sources)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _secret(named: str, path: str) -> str:
    """What a file holds, without the line's end."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise SettingsError(f"{named}: {path}: {cause}") from None


def _names(table: type[Settings]) -> dict[str, str]:
    """All that may be given, those that name files of secrets included, and of what type."""
    names = {}
    for one in fields(table):
        names[one.name] = str(one.type)
        if one.metadata.get("secret"):
            names[one.name + _FILE_SUFFIX] = "str"
    return names


def _from_file(table: type[Settings], path: str) -> dict[str, Any]:
    values = _parsed(path)
    known = _names(table)
    secrets = {one.name for one in fields(table) if one.metadata.get("secret")}
    for name, value in values.items():
        if name not in known:
            import difflib

            shown = ", ".join(one.name for one in fields(table))
            near = difflib.get_close_matches(name, known, n=1)
            guess = f" (did you mean {near[0]}?)" if near else ""
            raise SettingsError(
                f"config file {path}: unknown setting {name}{guess}; known are {shown}"
            )
        expected = known[name].split(" | ")[0]
        if expected == "float" and type(value) is int:
            values[name] = float(value)
        elif type(value).__name__ != expected:
            shown = "" if name in secrets else f", not {value!r}"
            raise SettingsError(f"config file {path}: {name} must be of type {expected}{shown}")
    return values


def _parsed(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read()
        if path.lower().endswith(_YAML_ENDINGS):
            return _parsed_yaml(path, data)
        import tomllib

        return tomllib.loads(data.decode())
    except OSError as error:
        raise SettingsError(f"config file {path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"config file {path}: {error}") from None


def _parsed_yaml(path: str, data: bytes) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise SettingsError(
            f"config file {path}: reading YAML needs the extra: pip install 'ochredb[cluster]'"
        ) from None
    try:
        values = yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError("must be names and values")
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
