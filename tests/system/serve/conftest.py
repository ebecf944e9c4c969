"""One Ray cluster with the whole service on it, shared by every test here: starting it takes most of a minute.

It ends with the last test of this folder: two services at a time slow each other down. Tests that start one of another
config are in `variants`, unless they hold it against this one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.serve.service import Service, running_service


@pytest.fixture(scope="package")
def service() -> Iterator[Service]:
    """Started once; a test that breaks something repairs it."""
    with running_service() as running:
        yield running
