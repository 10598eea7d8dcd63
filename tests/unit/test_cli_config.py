"""Settings of the command line: precedence, refusals, and what they mean for the node."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from ochredb_node.cli import main, node_config
from ochredb_node.settings import Settings, SettingsError, add_arguments, is_loopback, load


def parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args(arguments))


def test_defaults() -> None:
    settings = load(parse(), {})
    assert settings == Settings()
    assert (settings.host, settings.port, settings.allow_reset) == ("127.0.0.1", 8000, False)
    assert settings.token is None


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ochre.toml"
    file.write_text('path = "/f"\nport = 1\nallow_reset = true\ndeadline_s = 5\nlog_level="error"')
    environment = {
        "OCHREDB_CONFIG": str(file),
        "OCHREDB_PORT": "2",
        "OCHREDB_PATH": "/e",
        "OCHREDB_ALLOW_RESET": "no",
        "OCHREDB_TOKEN": "",
    }
    settings = load(parse("--port", "3"), environment)
    assert (settings.port, settings.path, settings.allow_reset) == (3, "/e", False)
    assert (settings.deadline_s, settings.log_level, settings.token) == (5.0, "error", None)
    other = tmp_path / "other.toml"
    other.write_text("port = 9")
    assert load(parse("--config", str(other)), {"OCHREDB_CONFIG": str(file)}).port == 9
    assert load(parse("--no-allow-reset"), {"OCHREDB_ALLOW_RESET": "1"}).allow_reset is False


def test_every_setting_has_a_flag_and_a_variable() -> None:
    flags = parse(
        "--path", "/p", "--host", "::1", "--port", "0", "--allow-reset", "--token", "t",
        "--insecure", "--log-level", "debug", "--deadline-s", "2.5", "--slow-request-s", "0.5",
        "--read-threads", "3", "--write-threads", "4", "--target-recall", "0.9",
    )  # fmt: skip
    from_flags = load(flags, {})
    variables = {
        "OCHREDB_PATH": "/p", "OCHREDB_HOST": "::1", "OCHREDB_PORT": "0",
        "OCHREDB_ALLOW_RESET": "true", "OCHREDB_TOKEN": "t", "OCHREDB_INSECURE": "ON",
        "OCHREDB_LOG_LEVEL": "debug", "OCHREDB_DEADLINE_S": "2.5",
        "OCHREDB_SLOW_REQUEST_S": "0.5", "OCHREDB_READ_THREADS": "3",
        "OCHREDB_WRITE_THREADS": "4", "OCHREDB_TARGET_RECALL": "0.9",
    }  # fmt: skip
    assert from_flags == load({}, variables)
    assert from_flags == Settings(
        path="/p", host="::1", port=0, allow_reset=True, token="t", insecure=True,
        log_level="debug", deadline_s=2.5, slow_request_s=0.5, read_threads=3, write_threads=4,
        target_recall=0.9,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"OCHREDB_PORT": "x"}, "OCHREDB_PORT must be a number, not 'x'"),
        ({"OCHREDB_PORT": "65536"}, "port must be 0 to 65535, not 65536"),
        ({"OCHREDB_ALLOW_RESET": "maybe"}, "OCHREDB_ALLOW_RESET must be true or false"),
        ({"OCHREDB_LOG_LEVEL": "loud"}, "log_level must be one of debug, info"),
        ({"OCHREDB_DEADLINE_S": "0"}, "deadline_s must be above 0"),
        ({"OCHREDB_DEADLINE_S": "nan"}, "deadline_s must be above 0"),
        ({"OCHREDB_READ_THREADS": "0"}, "read_threads must be at least 1"),
        ({"OCHREDB_TARGET_RECALL": "1"}, "target_recall must be at least 0 and below 1"),
        ({"OCHREDB_TOKEN": "ä"}, "token must be one or more printable ASCII"),
        ({"OCHREDB_CONFIG": "/nonexistent.toml"}, "config file /nonexistent.toml: No such file"),
        ({"OCHREDB_HOST": "0.0.0.0"}, "listening on 0.0.0.0 lets other machines in"),
        ({"OCHREDB_HOST": "example.org"}, "listening on example.org lets other machines in"),
    ],
)
def test_bad_settings_are_named(environment: dict[str, str], problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({}, environment)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prot = 1", "unknown setting prot (did you mean port?); known are path, host, port"),
        ("a = 1", "unknown setting a; known are path, host, port"),
        ('port = "1"', "port must be of type int, not '1'"),
        ("port = true", "port must be of type int, not True"),
        ("allow_reset = 1", "allow_reset must be of type bool, not 1"),
        ("token = 5", "token must be of type str"),
        ("port =", "Invalid value"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "ochre.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load({"config": str(file)}, {})
    assert str(caught.value).startswith(f"config file {file}: {problem}")


def test_other_machines_need_a_token_or_consent() -> None:
    with pytest.raises(SettingsError):
        Settings(host="0.0.0.0")
    assert Settings(host="0.0.0.0", token="t").host == "0.0.0.0"
    assert Settings(host="0.0.0.0", insecure=True).token is None
    assert [is_loopback(host) for host in ("127.9.9.9", "::1", "localhost", "::", "10.0.0.1")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_settings_reach_the_node() -> None:
    config = node_config(
        Settings(path="/p", allow_reset=True, token="t", deadline_s=2.0, read_threads=3)
    )
    assert config.path == "/p"
    frontend = config.frontend
    assert (frontend.allow_reset, frontend.token, frontend.deadline_s) == (True, "t", 2.0)
    assert frontend.read_threads == 3 and frontend.write_threads >= 1
    assert not config.compactor.paused
    assert node_config(Settings(pause_compaction=True)).compactor.paused


def test_bad_settings_end_with_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OCHREDB_TOKEN", raising=False)
    assert main(["run", "--host", "0.0.0.0"]) == 2
    assert capsys.readouterr().err.startswith("ochredb: listening on 0.0.0.0")
    assert main([]) == 2
    with pytest.raises(SystemExit) as caught:
        main(["run", "--port", "x"])
    assert caught.value.code == 2
