"""The contract on every adapter: once joined, leased where an adapter sees a difference; on one adapter all of it.

``scripts/prove --brokers`` runs all of it on all of them, each case by processes of its own.

The cases mostly wait, for processes and brokers, so several run at a time; each test waits for its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.adapters.rigs.adapters import ADAPTERS, missing_broker
from tests.adapters.rigs.contract import CASES, MODES, Counted, Places, excused, one_after_another
from tests.kit.servers import missing

AT_ONCE = 4
WHOLE = "aio_pika"
"""The adapter on which all cases are run in both modes."""

RUN = {**CASES, "one after another": one_after_another}
# A broker sees no difference between a consumer that dies before its effect and one that dies before its commit. A
# message that was handled, or was another one, is settled the same way in both modes.
CHOSEN = [(WHOLE, mode, case) for mode in MODES for case in CASES] + [
    (adapter, mode, case)
    for adapter in ADAPTERS
    if adapter != WHOLE
    for mode, case in (("joined", "one after another"), ("joined", "busy"), ("leased", "busy"))
]


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
                    begun[item.nodeid] = pool.submit(RUN[case], places, adapter, mode)
        yield begun
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("adapter", "mode", "case"), CHOSEN)
def test_a_message_takes_effect_once_and_is_settled_once(
    adapter: str, mode: str, case: str, request: pytest.FixtureRequest, running: dict[str, Future[Counted]]
) -> None:
    if reason := missing_broker(adapter):
        missing(reason)
    if reason := excused(adapter, case):
        pytest.skip(reason)
    counted = running[request.node.nodeid].result()
    assert counted.ok, counted
