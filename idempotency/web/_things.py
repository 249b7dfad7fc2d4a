"""One thing as the page shows it: what is known of it, and what an operator may do with it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from idempotency.web._audited import NotChangedError

Act = Callable[[str, Mapping[str, str]], Awaitable[str]]
"""Does an action for the operator of this name, with what the form says, and returns its outcome in words."""


_SKEW = 2.0
"""Seconds by which the clocks of two processes that show the page may differ, and the time in a form is rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """An action that a thing allows. ``target``: the step or signal that it is about. ``help``: what it does.

    ``inputs``: names of JSON values that the form asks for besides, each with its label. ``seen``: what an operator
    decides about, which a form sends back; ``age``: how many seconds ago it began, None where that does not count.
    """

    name: str
    help: str
    act: Act
    target: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    seen: str = ""
    age: float | None = None

    @property
    def id(self) -> str:
        """Return what a form sends to name this action."""
        return f"{self.name}:{self.target}"

    def is_as_seen(self, form: Mapping[str, str], now: float) -> bool:
        """Return whether this is still what the operator saw who sent a form.

        The same state may have come again: then it began after the page was read. ``now`` is in seconds.
        """
        if form.get("seen", "") != self.seen:
            return False
        if self.age is None:
            return True
        read = form.get("read", "")
        return read.isdecimal() and len(read) < 20 and self.age > now - int(read) - _SKEW


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A table below the facts of a thing."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    links: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One thing. ``kind`` and ``id`` name it in its URL and in the audit. ``secrets``: facts that are hidden.

    ``part``: a table of what belongs to it.
    """

    kind: str
    id: str
    facts: Mapping[str, str]
    offers: Sequence[Offer] = ()
    secrets: Mapping[str, str] = field(default_factory=dict)
    part: Part | None = None

    @property
    def named(self) -> str:
        """Return its name in the audit."""
        return f"{self.kind} {self.id}"

    def offer(self, id: str) -> Offer | None:
        """Return the action of this id, if the thing allows it."""
        return next((offer for offer in self.offers if offer.id == id), None)


def changed(whether: bool, outcome: str) -> str:
    """Return the outcome of an action; NotChangedError if it changed nothing."""
    if not whether:
        raise NotChangedError("it is not any more as it was shown: nothing was changed")
    return outcome


def json_in(form: Mapping[str, str], name: str) -> Any:
    """Return a JSON value of a form, None for one that is empty."""
    text = form.get(name, "").strip()
    try:
        return json.loads(text) if text else None
    except ValueError:
        raise NotChangedError(
            f"{name} is JSON, such as 5, null or a text in double quotes: nothing was changed"
        ) from None
