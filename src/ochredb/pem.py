"""Certificates in PEM files: whether they can be used, before anybody relies on them."""

from __future__ import annotations

import ssl
from collections.abc import Callable


def check_authority(path: str) -> None:
    """A file of certificates. Raises ValueError that names it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _checked(lambda: context.load_verify_locations(path), f"{path} holds no certificate (PEM)")


def check_pair(certificate_path: str, key_path: str) -> None:
    """A certificate, with those between it and its authority, and its key; not encrypted.

    Raises ValueError that names the files.
    """
    # As an authority first: of a pair it is not told which of the two is wrong.
    check_authority(certificate_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _checked(
        # Nobody is there who could be asked for a password.
        lambda: context.load_cert_chain(certificate_path, key_path, password=""),
        f"{key_path} holds no key (PEM, not encrypted) of the certificate in {certificate_path}",
    )


def _checked(load: Callable[[], None], problem: str) -> None:
    try:
        load()
    except ssl.SSLError as error:
        raise ValueError(f"{problem}: {error.reason or error}") from error
    except OSError as error:
        raise ValueError(f"{problem}: {error.strerror}") from error
