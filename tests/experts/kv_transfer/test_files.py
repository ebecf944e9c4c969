"""Files of KV cache: whole or not there, checked as they are read, and gone when nobody wants them any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experts.kv_transfer.files import BadKVFileError, KVFolder, Label
from experts.kv_transfer.handover import Handover, ask_params, asked_name, digest_of, new_name
from tests.support.waiting import await_true

LABEL = Label(bytes(range(32)), bytes(range(32, 64)))
PARTS = [np.arange(100, dtype=np.uint8), np.arange(50, dtype=np.uint8)[::-1].copy()]
SIZE = 150
LONG_AGO_S = 1000.0

WRITER = """
import sys
import numpy as np
from experts.kv_transfer.files import KVFolder, Label

def parts():
    yield np.ones(1000, np.uint8)
    print("half", flush=True)
    sys.stdin.read()
    yield np.ones(1000, np.uint8)

KVFolder(sys.argv[1], 1 << 20).write(sys.argv[2], Label(bytes(32), bytes(32)), parts())
"""


@pytest.fixture
def folder(tmp_path: Path) -> KVFolder:
    return KVFolder(tmp_path / "kv", 1 << 20)


def test_what_was_written_is_read(folder: KVFolder) -> None:
    name = new_name()
    assert folder.write(name, LABEL, PARTS) == SIZE
    np.testing.assert_array_equal(folder.read(name, LABEL, SIZE), np.concatenate(PARTS))
    assert folder.path(name).stat().st_mode & 0o777 == 0o600
    folder.remove(name)
    folder.remove(name)
    with pytest.raises(BadKVFileError, match="No such file"):
        folder.read(name, LABEL, SIZE)


@pytest.mark.parametrize(
    ("label", "size", "why"),
    [
        (Label(bytes(32), LABEL.tokens), SIZE, "other weights"),
        (Label(LABEL.layout, bytes(32)), SIZE, "another prompt"),
        (LABEL, SIZE + 1, "expected 151"),
    ],
)
def test_a_file_of_something_else_is_refused(folder: KVFolder, label: Label, size: int, why: str) -> None:
    name = new_name()
    folder.write(name, LABEL, PARTS)
    with pytest.raises(BadKVFileError, match=why):
        folder.read(name, label, size)


def test_every_changed_byte_and_every_missing_one_is_noticed(folder: KVFolder) -> None:
    name = new_name()
    folder.write(name, LABEL, PARTS)
    whole = folder.path(name).read_bytes()
    for at in range(len(whole)):
        folder.path(name).write_bytes(whole[:at])
        with pytest.raises(BadKVFileError):
            folder.read(name, LABEL, SIZE)
        folder.path(name).write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(BadKVFileError):
            folder.read(name, LABEL, SIZE)


def test_a_writer_that_is_killed_leaves_no_file_and_what_it_leaves_is_swept(folder: KVFolder) -> None:
    name = new_name()
    where = folder.path(name).parent
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(where), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdin.close(), process.stdout.close()
    (left,) = where.iterdir()
    assert left.name != name
    with pytest.raises(BadKVFileError, match="No such file"):
        folder.read(name, LABEL, SIZE)
    assert folder.used_bytes() > 1000
    assert folder.sweep(LONG_AGO_S) == 0
    os.utime(left, (0, 0))
    assert folder.sweep(LONG_AGO_S) == 1
    await_true(lambda: not list(where.iterdir()), "the folder is empty")


def test_only_files_of_ours_are_swept_or_counted(folder: KVFolder) -> None:
    theirs = folder.path(new_name()).with_name("notes.txt")
    theirs.write_text("mine")
    os.utime(theirs, (0, 0))
    assert folder.sweep(LONG_AGO_S) == 0
    assert folder.used_bytes() == 0
    assert theirs.exists()


def test_a_file_that_would_be_too_much_is_not_written(folder: KVFolder, tmp_path: Path) -> None:
    small = KVFolder(tmp_path / "kv", 300)
    small.write(new_name(), LABEL, PARTS)
    with pytest.raises(BadKVFileError, match="may have 300"):
        small.write(new_name(), LABEL, PARTS)
    assert len(list((tmp_path / "kv").iterdir())) == 1


@pytest.mark.parametrize("name", ["../secret.kv", "/etc/passwd", "", "A" * 32 + ".kv", f"{'0' * 32}.kv.1"])
def test_a_name_that_is_none_of_ours_leads_nowhere(folder: KVFolder, name: str) -> None:
    with pytest.raises(BadKVFileError, match="no name of a KV file"):
        folder.read(name, LABEL, SIZE)
    with pytest.raises(BadKVFileError, match="no name of a KV file"):
        folder.write(name, LABEL, PARTS)
    folder.remove(name)


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(PermissionError, match="mode 777"):
        KVFolder(shared, 1)


def test_handovers_survive_the_way_and_nothing_else_becomes_one() -> None:
    handover = Handover(new_name(), 7, digest_of([1, 2], ["adapter"]).hex(), keep=True)
    assert Handover.of(handover.to_params()) == handover
    assert asked_name(ask_params(handover.name)) == handover.name
    assert digest_of([1, 2]) != digest_of([1, 2], ["adapter"]) != digest_of([12], ["adapter"])
    for strange in (None, "x", {}, {"do_remote_prefill": True}, {**handover.to_params(), "num_tokens": "7"}, []):
        assert Handover.of(strange) is None
        assert asked_name(strange) is None
