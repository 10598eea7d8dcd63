"""What a failed call of S3 means: whether it may have acted, whether to repeat it, what to say.

A reply that is lost and a 5xx say nothing about what the endpoint did; of a create that is an
outcome to be found out (`s3.py`), of anything else a reason to repeat it.
"""

from __future__ import annotations

import enum
import functools
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

from ochredb.clock import Clock
from ochredb.errors import NotFound, OchreError, StorageFull, Unavailable


class Fate(enum.Enum):
    """What became of the call."""

    ABSENT = "there is no such object"
    EXISTS = "the condition failed: the object exists"
    RANGE = "the range lies outside of the object"
    NOT_SENT = "no connection: it surely did not act"
    UNKNOWN = "it may have acted; repeating it may help"
    REFUSED = "it did not act, and repeating it would not help"


@dataclass(frozen=True, slots=True)
class Failure:
    """error: to be raised if it cannot be helped."""

    fate: Fate
    error: OchreError


class Attempts:
    """The pauses between attempts of one call: exponential, with full jitter, within a deadline."""

    def __init__(self, clock: Clock, rng: random.Random, allowed_s: float) -> None:
        """allowed_s: no attempt begins later."""
        self._clock, self._rng = clock, rng
        self._until_s = clock.monotonic_s() + allowed_s
        self._longest_s = _PAUSE_S

    def pause(self, error: OchreError) -> None:
        """Wait before the next attempt; raises the last one's error if there is no time for it."""
        wait_s = self._rng.uniform(0.0, self._longest_s)
        self._longest_s = min(2 * self._longest_s, _PAUSE_S_MAX)
        if self._clock.monotonic_s() + wait_s >= self._until_s:
            raise error
        self._clock.sleep(wait_s)


_PAUSE_S, _PAUSE_S_MAX = 0.05, 2.0
_FULL = {
    "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded",
    "InsufficientCapacity", "StorageFull",
}  # fmt: skip
# 4xx that the next attempt may not meet. 409: another create of this key is under way.
_PASSING = {
    "RequestTimeout", "SlowDown", "Throttling", "TooManyRequests", "OperationAborted",
    "ConditionalRequestConflict", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_HINTS = {
    "AccessDenied": "these credentials may not do this",
    "403": "the access key or its secret is wrong, or may not do this",  # To a HEAD.
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key is wrong, or a proxy changes requests",
    "ExpiredToken": "the session token has expired",
    "RequestTimeTooSkewed": "the clocks of this machine and of the endpoint differ",
    "NoSuchBucket": "there is no such bucket",
    "AuthorizationHeaderMalformed": "the region is wrong",
    "PermanentRedirect": "the bucket is in another region, or needs another addressing",
}


_NOT_TRUSTED = "CERTIFICATE_VERIFY_FAILED"  # OpenSSL's word, whatever was wrong with it.
SETTINGS_AT_FAULT = {
    _NOT_TRUSTED: "s3_ca_path",
    "NoSuchBucket": "object_store_url",
    "InvalidAccessKeyId": "s3_access_key_id",
    "SignatureDoesNotMatch": "s3_secret_access_key",
    "AuthorizationHeaderMalformed": "s3_region",
    "PermanentRedirect": "s3_endpoint",
}
"""Of an answer's code: waiting does not help, another setting does."""


class _Kinds(NamedTuple):
    """Of the exceptions of boto3 and below."""

    answered: Any
    by_tls: type[Exception]
    not_sent: tuple[type[Exception], ...]
    lost: tuple[type[Exception], ...]
    no_credentials: tuple[type[Exception], ...]


@functools.cache
def _kinds() -> _Kinds:
    # Late: whoever gets an exception of theirs has imported them.
    from botocore import exceptions, parsers
    from urllib3.exceptions import HTTPError

    return _Kinds(
        answered=exceptions.ClientError,
        by_tls=exceptions.SSLError,
        not_sent=(
            exceptions.EndpointConnectionError,
            exceptions.ConnectTimeoutError,
            exceptions.ProxyConnectionError,
        ),
        lost=(
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            exceptions.IncompleteReadError,
            parsers.ResponseParserError,
            HTTPError,
            OSError,
        ),
        no_credentials=(
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.CredentialRetrievalError,
            exceptions.TokenRetrievalError,
            exceptions.ProfileNotFound,
        ),
    )


def failure_of(error: Exception, verb: str, key: str, place: str) -> Failure:
    """Read one of boto3's exceptions; one that is none of these is a bug, and raised again.

    verb, key: what was tried. place: the bucket and its endpoint, for messages.
    """
    said, kinds = f"cannot {verb} {key or 'objects'} in {place}", _kinds()
    if isinstance(error, kinds.answered):
        return _answered(vars(error)["response"], said, key)
    if isinstance(error, kinds.by_tls):
        if _NOT_TRUSTED in str(error):
            hint = "s3_ca_path says who signs a private endpoint's certificate"
            text = f"{said}: {error} ({hint})"
            return Failure(Fate.REFUSED, Unavailable(text, key=key, code=_NOT_TRUSTED))
        return Failure(Fate.UNKNOWN, Unavailable(f"{said}: {error}", key=key))  # It broke.
    if isinstance(error, kinds.not_sent):
        return Failure(Fate.NOT_SENT, Unavailable(f"{said}: {error}", key=key))
    if isinstance(error, kinds.lost):
        return Failure(Fate.UNKNOWN, Unavailable(f"{said}: {error}", key=key))
    if isinstance(error, kinds.no_credentials):
        hint = "give s3_access_key_id and s3_secret_access_key, or what boto3 finds by itself"
        return Failure(Fate.REFUSED, Unavailable(f"{said}: {error}; {hint}", key=key))
    raise error


def _answered(response: dict[str, Any], said: str, key: str) -> Failure:
    """An answer other than 2xx."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    text = str(response.get("Error", {}).get("Message") or "")
    cause = f"{said}: {status}" if code == str(status) else f"{said}: {status} {code}"
    if text and text != "Unknown":
        cause += f", {text}"
    if code in _HINTS:
        cause += f" ({_HINTS[code]})"
    detail = {"key": key, "status": status, "code": code}
    if status == 507 or code in _FULL:
        return Failure(Fate.REFUSED, StorageFull(cause, **detail))
    unavailable = Unavailable(cause, **detail)
    if status == 404 and code != "NoSuchBucket":
        return Failure(Fate.ABSENT, NotFound(f"no object {key}", key=key))
    if status == 412:
        return Failure(Fate.EXISTS, unavailable)
    if status == 416:
        return Failure(Fate.RANGE, unavailable)
    if status >= 500 or status in (408, 409, 429) or code in _PASSING:
        return Failure(Fate.UNKNOWN, unavailable)
    return Failure(Fate.REFUSED, unavailable)
