"""The list of events in the documents, compared with their types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

import pytest

from idempotency.events import Event, EventHooks
from idempotency.outbox.events import RelayEvent, RelayHooks
from tests.kit.paths import ROOT
from tests.kit.script_modules import script_modules

PAGE = (ROOT / "docs/events.md").read_text()


def test_the_page_has_each_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its level and its meaning, as ``scripts/list_events.py`` prints them."""
    script: Any = script_modules(monkeypatch, ROOT / "scripts")("list_events")
    for name, module, kinds in script.TYPES:
        table = script.table(module, kinds)
        section = PAGE.partition(f"\n## `{name}`\n")[2].partition("\n## ")[0]

        assert table in section
        assert len(re.findall(r"^\| `[a-z-]+` \| (?:debug|warning) \|", section, re.MULTILINE)) == len(get_args(kinds))


@pytest.mark.parametrize("several", [False, True])
def test_a_hook_does_not_take_the_place_of_the_log(several: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Each hook is given the event, also after one that fails, and there is one line in the log."""
    seen: list[Event] = []

    def broken(event: Event) -> None:
        raise ValueError

    hooks: Sequence[Any] = [broken, seen.append] if several else [seen.append]
    event = Event(kind="held", operation="POST /orders/7", record="0123456789ab", attempt=2)
    EventHooks(hooks if several else hooks[0]).deliver(event)

    assert seen == [event]
    assert caplog.messages[0] == "held POST /orders/7 record=0123456789ab attempt=2"
    assert caplog.messages[1:] == ["the event hook failed"] * several


def test_what_a_broker_answers_stays_in_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A line break, or half of a surrogate pair, is written as its escape."""
    event = RelayEvent(kind="refused", relay="outbox", count=1, reason="no\nforged \ud800")
    RelayHooks().deliver(event)

    assert caplog.messages == [r"refused outbox count=1 oldest=0.000: 'no\nforged \ud800'"]
