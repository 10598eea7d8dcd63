"""What a machine and a control group leave for reader processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ochredb_node import memory, readers


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "GROUP_FOLDER", f"{tmp_path}/")
    monkeypatch.setattr(readers, "GROUP_FOLDER", f"{tmp_path}/")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable:    2000000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO_FILE", str(meminfo))
    return tmp_path


def test_the_smaller_of_machine_and_group_counts(group: Path) -> None:
    assert memory.available_bytes() == 2_000_000 << 10
    (group / "memory.max").write_text("max\n")
    assert memory.available_bytes() == 2_000_000 << 10
    (group / "memory.max").write_text(f"{1 << 30}\n")
    (group / "memory.stat").write_text(f"file 999999999\nanon {400 << 20}\nanon_thp 0\n")
    assert memory.available_bytes() == (1 << 30) - (400 << 20), "its page cache gives way"
    (group / "memory.max").write_text(f"{500 << 20}\n")
    with pytest.raises(OSError, match="100 MiB of memory are available"):
        readers._check_memory()


def test_a_quota_of_processors_is_rounded_up(group: Path) -> None:
    assert readers._quota() == readers._PROCESSES_MAX
    for text, wanted in (
        ("max 100000\n", readers._PROCESSES_MAX),
        ("100000 100000\n", 1),
        ("150000 100000\n", 2),
        ("400000 100000\n", 4),
    ):
        (group / "cpu.max").write_text(text)
        assert readers._quota() == wanted
