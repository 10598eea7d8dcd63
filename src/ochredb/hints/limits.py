"""How much one tenant may ask of all frontends together: requests per second, and at a time.

Each frontend decides by itself, in a microsecond, from what it knows: its own requests, and what
Redis told it last of the others'. While a tenant is active the account in Redis is balanced about
twenty times a second. So together the frontends let through what was agreed, and for the
twentieth of a second that they do not know of one another a little more, which is then owed: the
account goes below zero. Without Redis each frontend applies the limits alone.

Whatever Redis says, a frontend lets a sixteenth of each limit through, one request at least: who
can write there, or a Redis that has gone mad, makes a tenant slow and shuts nobody out.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ochredb.clock import Clock
from ochredb.errors import Exhausted

if TYPE_CHECKING:
    from ochredb.hints.link import RedisLink

log = logging.getLogger("ochredb.hints")

_ACCOUNTS_MAX = 10_000
_BALANCE_PERIOD_S = 0.05
_OWN_SHARE = 1 / 16  # Of each limit. It counts in the account: more only with more frontends.
_OTHERS_FORGOTTEN_S = 2.0  # A frontend that reported this long ago has ended, or lost Redis.

# One hash for each tenant: `tokens` as of `at` (milliseconds by Redis' clock), and for each
# frontend `r:<name>` = "<requests running>:<when it said so>".
_BALANCE = """
local rate, burst, spent = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local kept = redis.call('HGETALL', KEYS[1])
local tokens, at, others = burst, now, 0
for i = 1, #kept, 2 do
  local name, value = kept[i], kept[i + 1]
  if name == 'tokens' then tokens = tonumber(value) or burst
  elseif name == 'at' then at = math.min(now, tonumber(value) or now)
  elseif name ~= ARGV[4] then
    local running, said = string.match(value, '^(%d+):(%d+)$')
    if said and math.abs(now - tonumber(said)) <= tonumber(ARGV[6]) then
      others = others + tonumber(running)
    else
      redis.call('HDEL', KEYS[1], name)
    end
  end
end
tokens = math.min(burst, tokens + (now - at) * rate / 1000) - spent
tokens = math.max(tokens, -burst)
redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', now, ARGV[4], ARGV[5] .. ':' .. now)
redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[7]))
return {tostring(tokens), others}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """Of each tenant, over all frontends. None: no limit.

    requests_burst: so many requests may come at once after a pause; by default a second's.
    """

    requests_per_second: float | None = None
    requests_burst: float | None = None
    concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_second", "requests_burst", "concurrent_requests"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        if self.requests_burst is not None and self.requests_burst < 1:
            raise ValueError(f"requests_burst must be at least 1, not {self.requests_burst}")

    @property
    def burst(self) -> float:
        return self.requests_burst or max(1.0, self.requests_per_second or 0.0)

    @property
    def own_burst(self) -> float:
        """Of one frontend, whatever the others do."""
        return max(1.0, self.burst * _OWN_SHARE)

    @property
    def own_concurrent(self) -> int:
        """Likewise, of requests that run at once."""
        return max(1, int((self.concurrent_requests or 0) * _OWN_SHARE))

    @property
    def is_none(self) -> bool:
        return self.requests_per_second is None and self.concurrent_requests is None


class Limits(Protocol):
    """Counts requests in and out. Quick; any thread."""

    def enter(self, tenant: str) -> None:
        """Raises Exhausted, and counts nothing, if the tenant asks too much."""
        ...

    def leave(self, tenant: str) -> None:
        """Of a request that was let in: it is answered."""
        ...


@dataclass(slots=True)
class _Account:
    """What this frontend knows of a tenant."""

    tokens: float  # Of all frontends together, as far as is known.
    own: float  # Of this one's share, which no other takes.
    at_s: float  # When that was so.
    running: int = 0
    others: int = 0  # Running elsewhere, as Redis said ...
    others_at_s: float = 0.0  # ... at that time.
    spent: int = 0  # Since Redis was told.


class LocalLimits:
    """The limits of one frontend, for itself."""

    def __init__(
        self,
        config: LimitsConfig,
        clock: Clock,
        on_active: Callable[[], None] | None = None,
    ) -> None:
        """on_active: called after a request was let in, by whoever calls `take_active`."""
        self._config, self._clock, self._on_active = config, clock, on_active
        self._lock = threading.Lock()
        # By last use. One that goes for want of room is as good as unused.
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._active: set[str] = set()

    def enter(self, tenant: str) -> None:
        rate, at_once = self._config.requests_per_second, self._config.concurrent_requests
        with self._lock:
            now_s = self._clock.monotonic_s()
            account = self._account(tenant, now_s)
            if rate is not None and account.tokens < 1.0 and account.own < 1.0:
                raise Exhausted(
                    f"tenant {tenant} may make {rate:g} requests per second",
                    retry_after_s=min(1.0 - account.tokens, (1.0 - account.own) / _OWN_SHARE)
                    / rate,
                )
            if at_once is not None:
                known = now_s - account.others_at_s < _OTHERS_FORGOTTEN_S
                others = account.others if known else 0
                # With `others` as Redis told them no fewer run here than this frontend's own share.
                most = max(at_once - others, self._config.own_concurrent)
                if account.running >= most:
                    raise Exhausted(f"tenant {tenant} may have {at_once} requests running at once")
            account.tokens -= 1.0
            account.own = max(0.0, account.own - 1.0)
            account.spent += 1
            account.running += 1
            if self._on_active is None:
                return
            self._active.add(tenant)
        self._on_active()

    def leave(self, tenant: str) -> None:
        with self._lock:
            account = self._accounts.get(tenant)
            if account is not None:
                account.running -= 1
                if self._on_active is not None:
                    self._active.add(tenant)

    def take_active(self) -> list[tuple[str, int, int]]:
        """(tenant, requests since this was last asked, requests running) of those with either."""
        with self._lock:
            report = []
            for tenant in self._active:
                account = self._accounts.get(tenant)
                if account is not None:
                    report.append((tenant, account.spent, account.running))
                    account.spent = 0
            self._active = {tenant for tenant, _, running in report if running}
            return report

    def put_balance(self, tenant: str, tokens: float, others: int) -> None:
        """What all frontends together have left, and how much runs on the others."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            account = self._account(tenant, now_s)
            burst = self._config.burst
            account.tokens = min(burst, max(-burst, tokens)) - account.spent
            account.others, account.others_at_s = max(0, others), now_s

    def _account(self, tenant: str, now_s: float) -> _Account:
        """As of now."""
        burst = self._config.burst
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= _ACCOUNTS_MAX:
                idle = next((name for name, one in self._accounts.items() if not one.running), None)
                if idle is None:
                    raise Exhausted(f"{_ACCOUNTS_MAX} tenants have requests running")
                del self._accounts[idle]
            account = self._accounts[tenant] = _Account(burst, self._config.own_burst, now_s)
        self._accounts.move_to_end(tenant)
        earned = (now_s - account.at_s) * (self._config.requests_per_second or 0.0)
        account.tokens = min(burst, account.tokens + earned)
        account.own = min(self._config.own_burst, account.own + earned * _OWN_SHARE)
        account.at_s = now_s
        return account


class SharedLimits:
    """`LocalLimits` that are balanced with those of other frontends through Redis.

    name: unique to this process. `start` and `close` belong to its owner, as the link's do.
    """

    def __init__(self, link: RedisLink, config: LimitsConfig, clock: Clock, name: str) -> None:
        self._link, self._config, self._clock, self._name = link, config, clock, name
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._here = LocalLimits(config, clock, self._wake.set)
        self._thread: threading.Thread | None = None
        self._script: Any = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="ochredb-limits", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2 * self._link.config.patience_s)
            self._thread = None

    def enter(self, tenant: str) -> None:
        self._here.enter(tenant)

    def leave(self, tenant: str) -> None:
        self._here.leave(tenant)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            while not self._stop.is_set() and self._balance():
                self._stop.wait(_BALANCE_PERIOD_S)

    def _balance(self) -> bool:
        """Report, and note what comes back; whether there was anything to report."""
        report = self._here.take_active()
        if not report:
            return False
        answers = self._link.ask_patiently(lambda client: self._asked(client, report))
        for (tenant, _, _), answer in zip(report, answers or (), strict=False):
            balance = _parsed(answer)
            if balance is not None:
                self._here.put_balance(tenant, *balance)
        return True

    def _asked(self, client: Any, report: list[tuple[str, int, int]]) -> list[Any]:
        """One round trip. A server without the script is given it by the pipeline."""
        if self._script is None:
            self._script = client.register_script(_BALANCE)
        config = self._config
        rate, burst = config.requests_per_second or 0.0, config.burst
        idle_s = max(2 * burst / rate if rate else 0.0, 2 * _OTHERS_FORGOTTEN_S)
        pipeline = client.pipeline(transaction=False)
        for tenant, spent, running in report:
            self._script(
                keys=[f"{self._link.prefix}limit:{tenant}"],
                args=[
                    rate, burst, spent if rate else 0, f"r:{self._name}", running,
                    int(_OTHERS_FORGOTTEN_S * 1000), int(idle_s * 1000),
                ],
                client=pipeline,
            )  # fmt: skip
        answers: list[Any] = pipeline.execute()
        return answers


def _parsed(answer: Any) -> tuple[float, int] | None:
    """Tokens left and requests running elsewhere; None for nonsense."""
    try:
        tokens, others = answer
        balance = float(tokens), int(others)
    except (TypeError, ValueError):
        return None
    return balance if balance[0] == balance[0] else None
