"""The options of every consumer, checked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict

from idempotency._engine.calls import Calls
from idempotency._messages.attempts import Attempts
from idempotency._messages.rules import Rules
from idempotency._messages.settlement import Final
from idempotency._results.codec import Codec, results_of
from idempotency.errors import ConfigurationError, UnknownOptionError
from idempotency.events import EventHooks, OnEvent
from idempotency.policy import Policy

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker


_WEEK = Policy(ttl=timedelta(days=7))


class ConsumerOptions(TypedDict, total=False):
    """The options of every consumer, for the decorator and for each adapter.

    ``session``: a sessionmaker on the database of the store, an SQLStore: the handler's effect and its record are then
    one transaction. Default None: leased. ``lock_timeout``: seconds a duplicate waits for such a transaction, default
    5. ``policy``: its ``ttl`` (default here 7 days: longer than the broker can redeliver), ``lease``, ``wait``,
    ``on_crash``, ``on_store_error``, ``outcomes`` by exception class, and ``max_response`` apply. ``codec``: how the
    result becomes bytes, default by the annotation of what the handler returns.
    ``max_attempts``: how often a message is handled, counted in the store: each failure counts, and each redelivery
    that was begun and never ended. Default None: as often as the broker delivers. ``on_exhausted``: how a message is
    settled after that. ``on_refused``: how a message is settled whose key was used for another message, whose outcome
    is unknown, whose record cannot be read, or which ``key`` or ``fingerprint`` cannot read. Both are ``"dead-letter"``
    (the default) or ``"stop"``: an error is raised, which stops the consumer.
    ``on_event``: as everywhere.
    """

    session: async_sessionmaker[AsyncSession] | sessionmaker[Session] | None
    policy: Policy
    codec: Codec | None
    lock_timeout: float
    max_attempts: int | None
    on_exhausted: Final
    on_refused: Final
    on_event: OnEvent


def rules_of(consumer: str, returns: Callable[..., Any], options: ConsumerOptions) -> Rules:
    """Make the rules of a consumer of that name; ``returns``: the function whose result is recorded.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """
    if not isinstance(consumer, str) or not consumer:
        raise ConfigurationError(f"consumer must be a name, not {consumer!r}")
    max_attempts = options.get("max_attempts")
    if max_attempts is not None and (type(max_attempts) is not int or max_attempts < 1):
        raise ConfigurationError(f"max_attempts must be a number, at least 1, or None: {max_attempts!r}")
    on_exhausted, on_refused = options.get("on_exhausted", "dead-letter"), options.get("on_refused", "dead-letter")
    for name, value in (("on_exhausted", on_exhausted), ("on_refused", on_refused)):
        if value not in ("dead-letter", "stop"):
            raise ConfigurationError(f'{name} must be "dead-letter" or "stop", not {value!r}')
    unknown = set(options) - ConsumerOptions.__optional_keys__
    if unknown:
        raise UnknownOptionError(
            f"unknown options: {', '.join(sorted(unknown))}; there are "
            f"{', '.join(sorted(ConsumerOptions.__optional_keys__))}"
        )
    calls = Calls(
        name=consumer,
        scope=f"consumer:1:{consumer}",
        policy=options.get("policy", _WEEK),
        results=results_of(returns, options.get("codec")),
        hooks=EventHooks(options.get("on_event", ())),
        surface="message",
    )
    attempts = Attempts(calls.scope, calls.policy.ttl, max_attempts)
    return Rules(calls, attempts, on_exhausted, on_refused, options.get("session") is not None)
