"""The generated code is what the definitions say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .kernel import ROOT

_PROTOS = ROOT / "protos"
_GENERATED = Path("ochredb/proto/v1")


def test_the_generated_code_is_up_to_date(tmp_path: Path) -> None:
    """As `make protos` makes it."""
    definitions = sorted((_PROTOS / _GENERATED).glob("*.proto"))
    services = [path for path in definitions if path.stem != "common"]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(_PROTOS)]
    for outputs, paths in (
        ((f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"), definitions),
        ((f"--grpc_python_out={tmp_path}",), services),
    ):
        subprocess.run([*command, *outputs, *map(str, paths)], check=True)
    committed = ROOT / "src" / _GENERATED
    made = {path.name: path.read_text() for path in (tmp_path / _GENERATED).iterdir()}
    found = {
        path.name: path.read_text()
        for path in committed.iterdir()
        if path.is_file() and path.name != "__init__.py"
    }
    assert found.keys() == made.keys()
    different = [name for name in made if made[name] != found[name]]
    assert not different, f"run `make protos`: {different} differ"
