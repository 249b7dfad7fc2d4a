"""Fixtures of the tests of FastStream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.adapters.rigs.adapters import missing_broker
from tests.adapters.rigs.faststream_brokers import Heard, Rabbit
from tests.kit.servers import missing


@pytest.fixture
def rabbit() -> Iterator[Rabbit]:
    if reason := missing_broker("faststream_rabbit"):
        missing(reason)
    opened = Rabbit()
    yield opened
    opened.close()


@pytest.fixture
def heard() -> Heard:
    return Heard()
