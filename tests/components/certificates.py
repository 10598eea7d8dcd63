"""A certificate authority of a test's own, by openssl.

ours = Authority.make(tmp_path / "ours")
certificate, key = ours.certificate("node", "IP:127.0.0.1")
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True, slots=True)
class Authority:
    """In a folder, with all that it has signed."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Authority:
        folder.mkdir()
        own = ("-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.pem"))
        openssl("req", "-x509", *_NEW_KEY, *own, "-days", "2", "-subj", "/CN=authority")
        return cls(folder)

    @property
    def ca(self) -> str:
        return str(self.folder / "ca.pem")

    def certificate(self, name: str, addresses: str) -> tuple[str, str]:
        """A certificate for "IP:127.0.0.1", "DNS:name" or several between commas, and its key, as
        paths."""
        key, request = self.folder / f"{name}.key", self.folder / f"{name}.csr"
        certificate, extension = self.folder / f"{name}.pem", self.folder / f"{name}.ext"
        extension.write_text(f"subjectAltName={addresses}\n")
        subject = ("-subj", f"/CN={name}")
        openssl("req", "-new", *_NEW_KEY, "-keyout", str(key), "-out", str(request), *subject)
        signer = ("-CA", self.ca, "-CAkey", str(self.folder / "ca.key"), "-CAcreateserial")
        openssl(
            *("x509", "-req", "-in", str(request), *signer, "-days", "2"),
            *("-extfile", str(extension), "-out", str(certificate)),
        )
        return str(certificate), str(key)


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
