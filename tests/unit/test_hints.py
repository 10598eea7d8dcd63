"""Hints within a process, what is heard from others, and limits of one frontend (I11, I12)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from ochredb.clock import SystemClock
from ochredb.errors import Exhausted
from ochredb.hints.base import Hint, HintKind, Hints, InProcessHints, NoHints
from ochredb.hints.limits import LimitsConfig, LocalLimits
from ochredb.hints.link import RedisConfig
from ochredb.hints.redis import decode, encode

from .fake_roles import make_frontend
from .kernel import ManualClock
from .live_server import ONE, Live


def test_listeners_of_a_kind_are_told_at_once_and_one_that_fails_keeps_nobody() -> None:
    hints: Hints = InProcessHints()
    heard: list[tuple[str, int]] = []

    def fails(_collection: str, _number: int) -> None:
        raise ValueError("a listener may fail")

    hints.subscribe(HintKind.APPENDED, fails)
    hints.subscribe(HintKind.APPENDED, lambda *told: heard.append(told))
    hints.subscribe(HintKind.DROPPED, lambda *told: heard.append(told))
    hints.start()
    hints.publish(Hint(HintKind.APPENDED, "c", 7))
    hints.publish(Hint(HintKind.VERSION, "c", 2))
    assert heard == [("c", 7)]
    hints.close()


def test_without_hints_nobody_is_told() -> None:
    hints: Hints = NoHints()
    hints.subscribe(HintKind.APPENDED, lambda *_: pytest.fail("told"))
    hints.start()
    hints.publish(Hint(HintKind.APPENDED, "c", 7))
    hints.close()


@pytest.mark.parametrize("kind", HintKind)
def test_a_message_is_read_as_it_was_written(kind: HintKind) -> None:
    hint = Hint(kind, "0190-c", 17)
    assert decode(encode("host/1/x", hint)) == ("host/1/x", hint)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"{}", b"\xff\xfe", b'["o","appended","c"]', b'["o","told","c",1]',
        b'["o","appended",5,1]', b'[5,"appended","c",1]', b'["o","appended","c",true]',
        b'["o","appended","c",-1]', b'["o","appended","c",1.5]', b'["o",["appended"],"c",1]',
        b'["o","appended","c",99999999999999999999999]',
        b'["o","appended","' + b"c" * 2_000 + b'",1]', "text", 5, None, [b"x"],
    ],
)  # fmt: skip
def test_what_is_no_hint_is_not_heard(data: object) -> None:
    assert decode(data) is None


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost"])
def test_a_url_of_something_else_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="redis_url"):
        RedisConfig(url=url)


def test_the_url_is_not_shown_because_it_holds_the_password() -> None:
    assert "secret" not in repr(RedisConfig(url="redis://:secret@localhost:6379/0"))


class TestLimits:
    def test_a_burst_passes_and_then_the_rate(self) -> None:
        clock = ManualClock()
        limits = LocalLimits(LimitsConfig(requests_per_second=10, requests_burst=3), clock)
        for _ in range(3):
            limits.enter("a")
        with pytest.raises(Exhausted, match="tenant a may make 10 requests per second") as refused:
            limits.enter("a")
        assert refused.value.retry_after_s == pytest.approx(0.1)
        limits.enter("b")
        clock.advance(0.1)
        limits.enter("a")
        with pytest.raises(Exhausted):
            limits.enter("a")
        clock.advance(60.0)
        for _ in range(3):
            limits.enter("a")
        with pytest.raises(Exhausted):
            limits.enter("a")

    def test_what_is_refused_is_not_counted(self) -> None:
        clock = ManualClock()
        limits = LocalLimits(LimitsConfig(concurrent_requests=2), clock)
        limits.enter("a")
        limits.enter("a")
        for _ in range(5):
            with pytest.raises(Exhausted, match="2 requests running"):
                limits.enter("a")
        limits.leave("a")
        limits.enter("a")
        with pytest.raises(Exhausted):
            limits.enter("a")

    def test_what_others_run_counts_until_it_is_old(self) -> None:
        clock = ManualClock()
        limits = LocalLimits(LimitsConfig(concurrent_requests=2), clock)
        limits.put_balance("a", 0.0, 2)
        limits.enter("a")  # One may run here, however many run elsewhere.
        with pytest.raises(Exhausted):
            limits.enter("a")
        clock.advance(3.0)
        limits.enter("a")

    def test_no_balance_takes_the_last_sixteenth_of_a_rate(self) -> None:
        """I11: again and again the account is said to owe all that it can."""
        clock = ManualClock()
        config = LimitsConfig(requests_per_second=160, requests_burst=64)
        limits = LocalLimits(config, clock)
        waits_s, let_in = [], 0
        for _ in range(1_000):  # Ten seconds.
            clock.advance(0.01)
            limits.put_balance("a", -1e9, 0)
            try:
                limits.enter("a")
            except Exhausted as refused:
                waits_s.append(refused.retry_after_s)
            else:
                let_in += 1
        assert let_in == pytest.approx(4 + 10 * 10, abs=2)
        assert max(waits_s) <= 0.1

    @pytest.mark.parametrize(("others", "here"), [(0, 32), (20, 12), (31, 2), (10**9, 2)])
    def test_nor_of_what_may_run_at_once(self, others: int, here: int) -> None:
        limits = LocalLimits(LimitsConfig(concurrent_requests=32), ManualClock())
        limits.put_balance("a", 0.0, others)
        for _ in range(here):
            limits.enter("a")
        with pytest.raises(Exhausted, match="32 requests running"):
            limits.enter("a")

    def test_a_share_is_part_of_the_limit_and_not_beside_it(self) -> None:
        clock = ManualClock()
        config = LimitsConfig(requests_per_second=160, requests_burst=64)
        limits = LocalLimits(config, clock)
        let_in = 0
        for _ in range(10_000):
            clock.advance(0.001)
            with suppress(Exhausted):
                limits.enter("a")
                limits.leave("a")
                let_in += 1
        assert let_in == pytest.approx(64 + 160 * 10, abs=2)

    def test_a_balance_replaces_what_was_known_but_not_what_was_spent_since(self) -> None:
        clock = ManualClock()
        config = LimitsConfig(requests_per_second=10, requests_burst=10)
        limits = LocalLimits(config, clock, lambda: None)
        limits.enter("a")
        assert limits.take_active() == [("a", 1, 1)]
        limits.enter("a")
        limits.put_balance("a", 2.0, 0)
        limits.enter("a")
        with pytest.raises(Exhausted):
            limits.enter("a")
        limits.put_balance("a", -1e300, 0)
        clock.advance(1.1 + 0.2)  # No debt is larger than a burst.
        limits.enter("a")

    def test_an_idle_tenant_is_not_reported(self) -> None:
        config = LimitsConfig(requests_per_second=10)
        limits = LocalLimits(config, ManualClock(), lambda: None)
        limits.enter("a")
        assert limits.take_active() == [("a", 1, 1)]
        assert limits.take_active() == [("a", 0, 1)]
        limits.leave("a")
        assert limits.take_active() == [("a", 0, 0)]
        assert limits.take_active() == []

    def test_accounts_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ochredb.hints.limits._ACCOUNTS_MAX", 2)
        limits = LocalLimits(LimitsConfig(requests_per_second=1), ManualClock())
        for name in ("a", "b", "c"):
            limits.enter(name)
            if name != "b":
                limits.leave(name)
        limits.enter("d")
        with pytest.raises(Exhausted, match="tenants have requests running"):
            limits.enter("e")

    @pytest.mark.parametrize("name", ["requests_per_second", "concurrent_requests"])
    def test_nonsense_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=name):
            LimitsConfig(**{name: 0})


@contextmanager
def _served(config: LimitsConfig) -> Iterator[Live]:
    frontend, _ = make_frontend()
    frontend.limits = LocalLimits(config, SystemClock())
    live = Live(frontend)
    try:
        yield live
    finally:
        live.close()


def test_a_server_answers_429_with_when_to_come_again() -> None:
    with _served(LimitsConfig(requests_per_second=0.01, requests_burst=4)) as live:
        path = live.collection()  # Two requests.
        assert live.http.get(f"{path}/count").status_code == 200
        assert live.http.get(path.rsplit("/", 1)[0]).status_code == 200
        for refused in (
            live.http.get(f"{path}/count"),
            live.http.post(f"{path}/add", json=ONE),
            live.http.get(path.rsplit("/", 1)[0]),
            live.http.post(f"{path}/add", content=b"x" * 200_000),
        ):
            assert refused.status_code == 429, refused.text
            assert 90 <= int(refused.headers["retry-after"]) <= 100
            assert refused.json()["error"] == "RateLimitError"
            assert "0.01 requests per second" in refused.json()["message"]
        assert live.http.get("/api/v2/heartbeat").status_code == 200


def test_what_is_answered_or_failed_does_not_count_as_running() -> None:
    with _served(LimitsConfig(concurrent_requests=1)) as live:
        path = live.collection()
        for _ in range(3):
            assert live.http.get(f"{path}/count").status_code == 200
            assert live.http.post(f"{path}/query", content=b"{").status_code >= 400
            assert live.http.post(f"{path}/add", json={"ids": ["a"]}).status_code >= 400
            assert live.http.get(f"{path.rsplit('/', 1)[0]}/absent").status_code == 404
