"""Where a bucket is, and how it is spoken to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from ochredb.errors import InvalidArgument
from ochredb.storage.base import is_key

_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,62}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Config:
    """Where the bucket is and how it is spoken to. Without credentials boto3 looks for them.

    prefix: keys lie below `prefix/`; one deployment each. addressing: `path` for most endpoints
        that are not Amazon's; `auto` takes it for an `endpoint_url` that is given.
    encryption: `AES256` (SSE-S3) or `aws:kms`, with `kms_key_id` or the account's own key.
    deadline_s: no attempt begins later than this after the first (large uploads: later).
    connections_max: that are kept; half of them fetch ranges.
    """

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    addressing: Literal["auto", "path", "virtual"] = "auto"
    ca_bundle: str | None = None
    encryption: Literal["AES256", "aws:kms"] | None = None
    kms_key_id: str | None = None
    connect_timeout_s: float = 3.0
    read_timeout_s: float = 10.0
    deadline_s: float = 30.0
    connections_max: int = 32

    def __post_init__(self) -> None:
        if not _BUCKET.match(self.bucket):
            raise InvalidArgument(f"not the name of a bucket: {self.bucket!r}")
        if self.prefix and not is_key(self.prefix):
            raise InvalidArgument(
                f"not a prefix: {self.prefix!r} (names of A-Z, a-z, 0-9, '.', '_', '-' between "
                "single slashes)"
            )
        if self.endpoint_url is not None:
            parts = urlsplit(self.endpoint_url)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise InvalidArgument(f"not the URL of an endpoint: {self.endpoint_url!r}")
        if self.addressing not in ("auto", "path", "virtual"):
            raise InvalidArgument(f"addressing is auto, path or virtual, not {self.addressing!r}")
        if self.encryption not in (None, "AES256", "aws:kms"):
            raise InvalidArgument(f"encryption is AES256 or aws:kms, not {self.encryption!r}")
        if self.kms_key_id is not None and self.encryption != "aws:kms":
            raise InvalidArgument("a kms_key_id needs the encryption aws:kms")
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise InvalidArgument("an access key and its secret are given together, or neither")
        if self.session_token is not None and self.access_key_id is None:
            raise InvalidArgument("a session token belongs to an access key, which is not given")
        for name in ("connect_timeout_s", "read_timeout_s", "deadline_s", "connections_max"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be above 0, not {getattr(self, name)}")

    @classmethod
    def from_url(cls, url: str, **others: Any) -> S3Config:
        """Of `s3://bucket` or `s3://bucket/prefix`. others: further fields."""
        parts = urlsplit(url)
        if parts.scheme != "s3" or parts.query or parts.fragment:
            raise InvalidArgument(f"not the URL of a bucket: {url!r} (s3://bucket/prefix)")
        return cls(bucket=parts.netloc, prefix=parts.path.strip("/"), **others)

    @property
    def place(self) -> str:
        """For messages."""
        at = f" at {self.endpoint_url}" if self.endpoint_url else ""
        return f"bucket {self.bucket}{at}"


def connect(config: S3Config) -> Any:
    """boto3's client, which speaks to nobody yet. Raises InvalidArgument. Cost: about 0.3 s."""
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise InvalidArgument(
            f"an object store in S3 needs packages that are not installed ({error}): "
            "pip install 'ochredb[cluster]'"
        ) from error
    addressing = config.addressing
    if addressing == "auto" and config.endpoint_url is not None:
        addressing = "path"
    settings = Config(
        signature_version="s3v4",
        connect_timeout=config.connect_timeout_s,
        read_timeout=config.read_timeout_s,
        max_pool_connections=config.connections_max,
        retries={"total_max_attempts": 1, "mode": "standard"},
        # Every endpoint checks the signed payload; not every one knows the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": addressing, "payload_signing_enabled": True},
        tcp_keepalive=True,
        user_agent_extra="ochredb",
    )
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=config.endpoint_url,
            region_name=config.region or ("us-east-1" if config.endpoint_url else None),
            aws_access_key_id=config.access_key_id,
            aws_secret_access_key=config.secret_access_key,
            aws_session_token=config.session_token,
            verify=config.ca_bundle,
            config=settings,
        )
    except (BotoCoreError, ValueError) as error:
        raise InvalidArgument(f"cannot use {config.place}: {error}") from error
