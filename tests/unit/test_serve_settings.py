"""Settings of `ochredb serve`: each refusal, secrets in files, YAML, and `ochredb config`."""

from __future__ import annotations

import argparse
import re
import socket
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ochredb.storage.s3_config import connect
from ochredb_node.cli import main, node_config
from ochredb_node.cli_config import effective
from ochredb_node.roles import Role
from ochredb_node.serve_settings import ServeSettings
from ochredb_node.settings import SettingsError, add_arguments, load_table
from ochredb_node.urls import without_password
from ochredb_node.worker import worker_config
from tests.components.certificates import Authority

NODES: dict[str, Any] = {"log_nodes": "static:a=127.0.0.1:1", "query_nodes": "static:a=127.0.0.1:1"}
SHARED: dict[str, Any] = {"catalog_url": "postgresql://db/ochre", "object_store_url": "s3://bucket"}


def parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser, ServeSettings)
    return vars(parser.parse_args(arguments))


def load(flags: dict[str, Any], environment: dict[str, str]) -> ServeSettings:
    return load_table(ServeSettings, flags, environment).settings


def test_the_defaults_are_every_role_on_a_directory() -> None:
    settings = load(parse(), {})
    assert settings == ServeSettings()
    assert len(settings.role_set) == 4
    assert settings.serves_rest and settings.serves_rpc
    assert settings.catalog_url is None and settings.object_store_url is None
    assert settings.worker_count >= 1
    assert ServeSettings(roles="query").worker_count == 0


def test_flags_variables_and_both_kinds_of_file_have_the_same_names(tmp_path: Path) -> None:
    toml, yaml = tmp_path / "one.toml", tmp_path / "one.yaml"
    toml.write_text('roles = "log"\nrpc_port = 1\nallow_reset = true\ndeadline_s = 5\n')
    yaml.write_text("roles: log\nrpc_port: 1\nallow_reset: true\ndeadline_s: 5\n")
    from_toml, from_yaml = load(parse("--config", str(toml)), {}), load({"config": str(yaml)}, {})
    assert from_toml == from_yaml
    assert (from_toml.roles, from_toml.rpc_port, from_toml.deadline_s) == ("log", 1, 5.0)
    environment = {"OCHREDB_CONFIG": str(yaml), "OCHREDB_RPC_PORT": "2", "OCHREDB_ROLES": "query"}
    settings = load(parse("--rpc-port", "3"), environment)
    assert (settings.roles, settings.rpc_port, settings.allow_reset) == ("query", 3, True)


def test_a_secret_may_be_in_a_file_of_its_own(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    config = tmp_path / "one.toml"
    config.write_text(f'token_file = "{secret}"\n')
    assert load({"config": str(config)}, {}).token == "s3cret"
    assert load(parse("--rpc-token-file", str(secret)), {}).rpc_token == "s3cret"
    by_variable = load({"config": str(config)}, {"OCHREDB_TOKEN": "other"})
    assert by_variable.token == "other"
    with pytest.raises(SettingsError, match="OCHREDB_TOKEN and OCHREDB_TOKEN_FILE are both given"):
        load({}, {"OCHREDB_TOKEN": "a", "OCHREDB_TOKEN_FILE": str(secret)})
    with pytest.raises(SettingsError, match="OCHREDB_TOKEN_FILE: /nonexistent: No such file"):
        load({}, {"OCHREDB_TOKEN_FILE": "/nonexistent"})
    config.write_text(f'port_file = "{secret}"\n')
    with pytest.raises(SettingsError, match="unknown setting port_file"):
        load({"config": str(config)}, {})


def test_secrets_are_not_in_the_text_of_settings() -> None:
    settings = ServeSettings(token="s3cret", catalog_url="postgresql://u:s3cret@h/d")
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"roles": "log,lgo"}, "roles: unknown role 'lgo'; known are frontend, log, query"),
        ({"roles": ""}, "roles: unknown role ''"),
        ({"roles": "log,log"}, "roles: a role is named twice in 'log,log'"),
        ({"rpc_port": 65536}, "rpc_port must be 0 to 65535, not 65536"),
        ({"health_port": -1}, "health_port must be 0 to 65535, not -1"),
        ({"drain_timeout_s": 0.0}, "drain_timeout_s must be above 0, not 0.0"),
        ({"deadline_s": 301.0}, "deadline_s must be at most 300, not 301.0"),
        ({"compactor_workers": -1}, "compactor_workers must be at least 0, not -1"),
        (
            {"gc_grace_s": 59.0},
            "gc_grace_s must be at least twice deadline_s, 60, so that no request outlives what it"
            " reads, not 59.0",
        ),
        ({"gc_grace_s": 100.0, "deadline_s": 50.5}, "gc_grace_s must be at least twice"),
        ({"cache_bytes": 5}, "cache_bytes must be at least 67108864, not 5"),
        ({"query_memory_bytes": 5}, "query_memory_bytes must be at least 1048576, not 5"),
        ({"spread_bytes": -1}, "spread_bytes must be at least 0, not -1"),
        ({"requests_per_second": 0.0}, "requests_per_second must be above 0, not 0.0"),
        ({"requests_burst": 0.5}, "requests_burst must be at least 1, not 0.5"),
        ({"concurrent_requests": 0}, "concurrent_requests must be at least 1, not 0"),
        ({"rpc_token": "ä"}, "rpc_token must be one or more printable ASCII characters"),
        ({"catalog_url": "mysql://u:pw@h/d"}, "catalog_url must be like postgresql://USER@HOST"),
        ({"catalog_url": "postgresql://h:x/d"}, "catalog_url must be like postgresql://USER@HOST"),
        (
            {"object_store_url": "gs://b"},
            "object_store_url must be like s3://BUCKET/PREFIX, not 'gs://b'",
        ),
        ({"redis_url": "localhost:1"}, "redis_url must be like redis://HOST:PORT"),
        ({"s3_endpoint": "http://h:1"}, "s3_endpoint is given without object_store_url"),
        (
            {"object_store_url": "s3://b", "s3_access_key_id": "k"},
            "s3_access_key_id and s3_secret_access_key go together",
        ),
        (
            {"object_store_url": "s3://b", "s3_session_token": "pw"},
            "s3_session_token needs s3_access_key_id and s3_secret_access_key",
        ),
        ({"s3_addressing": "path"}, "s3_addressing is given without object_store_url"),
        (
            {"object_store_url": "s3://b", "s3_addressing": "host"},
            "s3_addressing must be one of auto, path, virtual",
        ),
        (
            {"object_store_url": "s3://b", "s3_encryption": "rot13"},
            "s3_encryption must be one of AES256, aws:kms",
        ),
        (
            {"object_store_url": "s3://b", "s3_kms_key_id": "k"},
            "s3_kms_key_id needs s3_encryption aws:kms",
        ),
        ({"s3_ca_path": "/nonexistent"}, "s3_ca_path is given without object_store_url"),
        (
            {"object_store_url": "s3://b", "s3_ca_path": "/nonexistent"},
            "s3_ca_path /nonexistent: No such file",
        ),
        ({"log_nodes": "a=1:2"}, "log_nodes must be static:NAME=HOST:PORT,... or dns:HOST:PORT or"),
        ({"log_nodes": "static:a"}, "log_nodes must be static:NAME=HOST:PORT,... or dns:HOST:PORT"),
        ({"log_nodes": "static:a=h:1,b"}, "log_nodes must be static:NAME=HOST:PORT,... or"),
        ({"log_nodes": "dns:h"}, "log_nodes must be static:NAME=HOST:PORT,... or dns:HOST:PORT"),
        (
            {"roles": "query", "node_name": "c", "query_nodes": "static:a=[::1]:1,b=localhost:1"},
            "query_nodes names a, b, and this query node is c: say which it is (node_name)",
        ),
        ({"roles": "frontend,query"}, "roles has frontend but not log: say where those nodes are"),
        ({"roles": "frontend,log"}, "roles has frontend but not query: say where those nodes"),
        (
            {"roles": "frontend", **NODES, "query_nodes": "dns:query:8100"},
            "query_nodes names other machines, which cannot share a SQLite catalog and a directory",
        ),
        (
            {"roles": "frontend", **NODES, **SHARED, "object_store_url": None,
             "log_nodes": "static:a=127.0.0.1:1,b=10.0.0.2:1"},
            "log_nodes names other machines, which cannot share a directory of objects in",
        ),
        ({"rpc_tls_cert_path": "x"}, "rpc_tls_cert_path and rpc_tls_key_path go together"),
        ({"rpc_tls_ca_path": "/nonexistent"}, "rpc_tls_ca_path /nonexistent: No such file"),
        ({"roles": "log", "rpc_host": "0.0.0.0"}, "gRPC on 0.0.0.0 lets other machines in"),
        (
            {"roles": "frontend", **NODES, "host": "0.0.0.0"},
            "listening on 0.0.0.0 lets other machines in",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        ServeSettings(**given)
    assert str(caught.value).startswith(problem)
    assert "pw" not in str(caught.value)


def test_a_file_that_is_no_certificate_is_refused_with_its_setting(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ours")
    certificate, key = authority.certificate("node", "DNS:node")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    bucket: dict[str, Any] = {"object_store_url": "s3://bucket"}
    for given, problem in (
        (
            {"rpc_tls_cert_path": certificate, "rpc_tls_key_path": str(empty)},
            f"rpc_tls_cert_path, rpc_tls_key_path: {empty} holds no key",
        ),
        (
            {"rpc_tls_cert_path": key, "rpc_tls_key_path": key},
            f"rpc_tls_cert_path, rpc_tls_key_path: {key} holds no certificate",
        ),
        ({"rpc_tls_ca_path": str(empty)}, f"rpc_tls_ca_path: {empty} holds no certificate"),
        ({**bucket, "s3_ca_path": str(empty)}, f"s3_ca_path: {empty} holds no certificate"),
    ):
        with pytest.raises(SettingsError, match=f"^{re.escape(problem)}"):
            ServeSettings(**given)


def test_what_is_right_is_taken(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ours")
    certificate, key = authority.certificate("node", "DNS:node")
    tls: dict[str, Any] = {"rpc_tls_cert_path": certificate, "rpc_tls_key_path": key}
    for given in (
        {"roles": "frontend", **NODES},
        {"roles": "frontend", **SHARED, "log_nodes": "kubernetes:log:1", "query_nodes": "dns:q:1"},
        {"roles": "query", "node_name": "b", "query_nodes": "static:a=[::1]:1,b=localhost:1"},
        {"roles": "query", "host": "0.0.0.0"},  # Does not listen there.
        {"roles": "frontend", **NODES, "rpc_host": "0.0.0.0"},  # Nor does this.
        {"roles": "log", "rpc_host": "0.0.0.0", "rpc_token": "t"},
        {"roles": "log", "rpc_host": "0.0.0.0", **tls, "rpc_tls_ca_path": authority.ca},
        {"roles": "log", "rpc_host": "0.0.0.0", "insecure": True},
    ):
        ServeSettings(**given)
    with pytest.raises(SettingsError, match="gRPC on 0"):  # TLS alone lets anybody in.
        ServeSettings(roles="log", rpc_host="0.0.0.0", **tls)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- roles", "must be names and values"),
        ("1: 2", "must be names and values"),
        ("roles: [log]", "roles must be of type str, not ['log']"),
        ("rpc_port: yes", "rpc_port must be of type int"),
        ("roles: 'log", "while scanning a quoted scalar"),
        ("rolls: log", "unknown setting rolls (did you mean roles?); known are path, host"),
    ],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "ochre.yml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load({"config": str(file)}, {})
    assert str(caught.value).startswith(f"config file {file}: {problem}")


def test_a_flag_of_the_wrong_type_is_told_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--rpc-port", "abc"])
    assert caught.value.code == 2
    usage, reason = capsys.readouterr().err.splitlines()
    assert usage == "usage: ochredb serve [OPTION]..."
    assert reason == "ochredb serve: error: argument --rpc-port: invalid int value: 'abc'"


def test_a_query_node_knows_its_name() -> None:
    def name(**given: Any) -> str:
        return node_config(ServeSettings(roles="query", insecure=True, **SHARED, **given)).name

    assert name() == socket.gethostname()
    assert name(query_nodes="kubernetes:query:rpc") == socket.gethostname()
    assert name(query_nodes="dns:query:8100", rpc_host="10.0.0.2") == "10.0.0.2:8100"
    assert name(query_nodes="dns:query:8100", rpc_host="0.0.0.0") == socket.gethostname()
    frontend = ServeSettings(
        roles="frontend", log_nodes="dns:log:8100", query_nodes="dns:query:8100", **SHARED
    )
    assert node_config(frontend).name == socket.gethostname()  # Not that of a query node.
    given: dict[str, Any] = {"query_nodes": "dns:query:8100", "rpc_host": "0.0.0.0"}
    assert name(node_name="10.0.0.2:8100", **given) == "10.0.0.2:8100"


def test_settings_reach_the_node() -> None:
    config = node_config(ServeSettings(**SHARED, cache_path="/c", compactor_workers=3))
    assert (config.path, config.compactor_workers) == (None, 3)
    assert config.s3 is not None and config.s3.bucket == "bucket"
    assert (config.cache_path, config.cache_bytes) == ("/c/node", (10 << 30) // 4)
    assert config.compactor.grace_s == 600.0
    assert worker_config(config, 3, "1").cache_path == "/c/worker-1"
    assert worker_config(config, 3, "1").roles == {Role.COMPACTOR}
    assert "postgresql" not in repr(config)
    eager: dict[str, Any] = {"gc_grace_s": 5.0, "deadline_s": 2.5}
    local = node_config(ServeSettings(path="/p", roles="frontend", **eager, **NODES))
    assert (local.path, local.s3, local.compactor.grace_s) == ("/p", None, 5.0)
    assert node_config(ServeSettings(path="/p", deadline_s=200.0)).compactor.grace_s == 400.0
    assert local.frontend.read_threads == 64, "they wait for other processes"
    assert node_config(ServeSettings(redis_url="redis://:pw@h:1")).redis is not None


def test_a_session_token_goes_with_what_is_asked_of_s3() -> None:
    secrets: dict[str, Any] = {"s3_secret_access_key": "hush", "s3_session_token": "t0ken"}
    settings = ServeSettings(
        object_store_url="s3://bucket", s3_region="us-east-1", s3_access_key_id="k", **secrets
    )
    assert "t0ken" not in repr(settings)
    config = node_config(settings).s3
    assert config is not None
    asked = connect(config).generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "x"})
    assert "X-Amz-Security-Token=t0ken" in asked


class TestConfig:
    """`ochredb config` prints TOML that means the same, each line with where it came from."""

    def test_it_says_where_each_came_from_and_hides_secrets(self, tmp_path: Path) -> None:
        file = tmp_path / "ochre.toml"
        file.write_text('path = "/d\\u00e4ta \\"x\\""\n')
        secret = tmp_path / "secret"
        secret.write_text("s3cret\n")
        environment = {
            "OCHREDB_CONFIG": str(file),
            "OCHREDB_TOKEN_FILE": str(secret),
            "OCHREDB_CATALOG_URL": "postgresql://me:s3cret@db:5432/ochre?sslmode=require",
            "OCHREDB_OBJECT_STORE_URL": "s3://bucket/prefix",
        }
        text = effective(load_table(ServeSettings, parse("--rpc-port", "7"), environment))
        lines = text.splitlines()
        assert f'path = "/däta \\"x\\""  # path in {file}' in lines
        assert 'token = "***"  # OCHREDB_TOKEN_FILE' in lines
        assert "rpc_port = 7  # --rpc-port" in lines
        assert "port = 8000  # default" in lines
        shown = "postgresql://me:***@db:5432/ochre?sslmode=require"
        assert f'catalog_url = "{shown}"  # OCHREDB_CATALOG_URL' in lines
        assert "# redis_url is not set" in lines
        assert "s3cret" not in text
        assert tomllib.loads(text)["path"] == '/däta "x"'
        assert len(lines) == len(fields(ServeSettings))

    def test_what_it_prints_can_be_used(self, tmp_path: Path) -> None:
        loaded = load_table(ServeSettings, parse("--roles", "log", "--deadline-s", "0.5"), {})
        file = tmp_path / "again.toml"
        file.write_text(effective(loaded))
        assert load({"config": str(file)}, {}) == loaded.settings

    def test_the_command(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OCHREDB_ROLES", "query")
        assert main(["config", "--rpc-token", "s3cret"]) == 0
        output = capsys.readouterr().out
        assert 'roles = "query"  # OCHREDB_ROLES' in output
        assert 'rpc_token = "***"  # --rpc-token' in output
        assert main(["config", "--roles", "frontend"]) == 2
        assert "roles has frontend but not log" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://h/d", "postgresql://h/d"),
        ("postgresql://u@h:5/d", "postgresql://u@h:5/d"),
        ("postgresql://u:p%40x@h:5/d", "postgresql://u:***@h:5/d"),
        ("redis://:pw@h:1/0", "redis://:***@h:1/0"),
        ("postgresql://u:a@b@h/d", "postgresql://u:***@h/d"),
        (
            "postgresql:///d?host=/run&password=pw&user=u",
            "postgresql:///d?host=/run&password=***&user=u",
        ),
        (
            "postgresql://u:pw@[::1]:5/d?sslpassword=p",
            "postgresql://u:***@[::1]:5/d?sslpassword=***",
        ),
    ],
)
def test_passwords_in_urls_are_hidden(url: str, shown: str) -> None:
    assert without_password(url) == shown
