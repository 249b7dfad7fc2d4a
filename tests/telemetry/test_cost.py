"""What is done for telemetry where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from idempotency import events
from idempotency._http import route_names
from idempotency.events import EventHooks
from tests.telemetry.kit import client, shop


def _fail(*args: Any, **options: Any) -> Any:
    raise AssertionError((args, options))


async def test_without_a_hook_no_event_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the route of a request looked for: by a first request, a replay and a refusal."""
    monkeypatch.setattr(events, "Event", _fail)
    monkeypatch.setattr(route_names, "Templates", _fail)
    async with client(shop()) as post:
        answers = [await post("/orders/7", body=body) for body in ("1", "1", "2")]

    assert [answer.status_code for answer in answers] == [200, 200, 422]
    async with client(shop(on_event=lambda _: None)) as post:
        assert (await post("/orders/7")).status_code == 500


@pytest.mark.parametrize(
    ("hooks", "kinds"),
    [
        (EventHooks(), {"held"}),
        (EventHooks(silent=True), set()),
        (EventHooks(lambda _: None, silent=True), {"held", "replayed"}),
    ],
    ids=["the log", "nothing", "a hook"],
)
def test_a_hook_wants_each_event_and_the_log_what_it_writes(hooks: EventHooks, kinds: set[str]) -> None:
    """The level of the log is WARNING."""
    assert {kind for kind in ("held", "replayed") if hooks.wants(kind)} == kinds
