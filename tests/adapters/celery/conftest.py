"""Fixtures of the tests of Celery."""

from __future__ import annotations

import pytest

from tests.adapters.rigs.adapters import missing_broker
from tests.kit.servers import missing

RIGS = ("celery_rabbit", "celery_redis")


@pytest.fixture(params=RIGS)
def adapter(request: pytest.FixtureRequest) -> str:
    if reason := missing_broker(request.param):
        missing(reason)
    return str(request.param)
