"""One Ray cluster with the whole service on it, shared by every test here: starting it takes most of a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.serve.service import Service, running_service


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """Started once; a test that breaks something repairs it."""
    with running_service() as running:
        yield running
