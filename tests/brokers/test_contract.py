"""The contract on every adapter: joined in full, leased where it differs; ``scripts/prove --brokers`` runs all of it.

The cases mostly wait, for processes and brokers, so several run at a time; each test waits for its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from servers import missing

from brokers.adapters import ADAPTERS, missing_broker
from brokers.contract import CASES, MODES, Counted, Places, excused

AT_ONCE = 4
LEASED = ("killed stored", "busy", "reused")
CHOSEN = [(mode, case) for mode in MODES for case in CASES if mode == "joined" or case in LEASED]


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, postgres_url: str, redis_url: str) -> Iterator[dict[str, Future[Counted]]]:
    """Every selected case, begun in their order."""
    places = Places(postgres_url, redis_url)
    begun: dict[str, Future[Counted]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for item in request.session.items:
            if item.fspath == request.path:
                chosen: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
                adapter, mode, case = chosen["adapter"], chosen["mode"], chosen["case"]
                if not missing_broker(adapter) and not excused(adapter, case):
                    begun[item.nodeid] = pool.submit(CASES[case], places, adapter, mode)
        yield begun
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("mode", "case"), CHOSEN)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_message_takes_effect_once_and_is_settled_once(
    adapter: str, mode: str, case: str, request: pytest.FixtureRequest, running: dict[str, Future[Counted]]
) -> None:
    if reason := missing_broker(adapter):
        missing(reason)
    if reason := excused(adapter, case):
        pytest.skip(reason)
    counted = running[request.node.nodeid].result()
    assert counted.ok, counted
