"""One process at a time uses a directory."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoact_remote.locks import LOCK, InUse, is_locked, lock

HOLD = """
import sys
from pathlib import Path
from zoact_remote.locks import lock

held = lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_lock_names_its_process_and_ends_with_it(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    lock(tmp_path).close()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        assert is_locked(tmp_path)
        with pytest.raises(InUse, match=f"^process {holder.pid}$") as caught:
            lock(tmp_path)
        assert caught.value.process == holder.pid
        holder.kill()
    assert not is_locked(tmp_path)
    with lock(tmp_path), pytest.raises(InUse, match=f"^process {os.getpid()}$"):
        lock(tmp_path)


def test_who_looks_changes_nothing(tmp_path: Path) -> None:
    lock(tmp_path).close()
    before = (tmp_path / LOCK).read_bytes()
    assert not is_locked(tmp_path)
    assert (tmp_path / LOCK).read_bytes() == before


def test_a_lock_that_says_nothing_yet(tmp_path: Path) -> None:
    with lock(tmp_path) as held:
        held.truncate(0)
        with pytest.raises(InUse, match=r"^another process$"):
            lock(tmp_path)


def test_a_lock_is_for_its_owner(tmp_path: Path) -> None:
    with lock(tmp_path) as held:
        assert os.fstat(held.fileno()).st_mode & 0o777 == 0o600


def test_a_lock_that_cannot_be_written_is_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
            lock(tmp_path)
    lock(tmp_path).close()
    assert caught.value.errno == errno.ENOSPC
