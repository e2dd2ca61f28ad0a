"""One browser for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.page.window import Chromium, chromium, program


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    found = program()
    assert found is not None, "there is no Chromium: ./dev test installs Debian's, or apt-get install chromium"
    with chromium(found) as running:
        yield running
