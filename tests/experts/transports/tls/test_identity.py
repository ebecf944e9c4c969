"""Which files a process starts with, and what it says of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from experts.protocol.settings import TlsFiles
from experts.transports.tls.identity import TlsIdentity
from tests.support.certificates import Authority

Change = Callable[[Authority, Authority], TlsFiles]


def mixed(ours: Authority, other: Authority, **taken: str) -> TlsFiles:
    """Files of one authority, with some of another's."""
    theirs = other.issue("theirs")
    return ours.issue("mine").model_copy(update={name: getattr(theirs, name) for name in taken})


def changed(name: str, path: str) -> Change:
    return lambda ours, other: ours.issue("mine").model_copy(update={name: path})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (changed("key_file", "/nowhere/a.key"), r"tls\.key_file: /nowhere/a\.key: cannot be read: No such file"),
        (changed("ca_file", "/"), r"tls\.ca_file: /: cannot be read: Is a directory"),
        (changed("ca_file", "/proc/version"), r"tls\.ca_file: .*expected certificates in PEM"),
        (changed("cert_file", "/proc/version"), r"tls\.cert_file .*expected PEM"),
        (lambda a, b: mixed(a, b, key_file=""), r"key values mismatch; expected PEM, and the certificate's own key"),
        (lambda a, b: mixed(a, b, ca_file=""), r"tls\.cert_file: .*get local issuer certificate; tls\.ca_file has"),
        (lambda a, b: a.issue("old", days=-1), r"tls\.cert_file: .*old\.pem: certificate has expired"),
        (lambda a, b: a.issue("hidden", password=b"x"), r"tls\.key_file is encrypted"),
    ],
)
def test_files_that_do_not_work_are_named(tmp_path: Path, files: Change, expected: str) -> None:
    ours, other = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "other", "other")
    with pytest.raises(ValueError, match=expected):
        TlsIdentity(files(ours, other))


def test_files_that_go_together_are_taken(tmp_path: Path) -> None:
    TlsIdentity(Authority(tmp_path, "ours").issue("mine"))


def test_paths_hold_on_every_node() -> None:
    with pytest.raises(ValidationError, match=r"'a\.pem' is no absolute path"):
        TlsFiles(cert_file="a.pem", key_file="/b", ca_file="/c")
