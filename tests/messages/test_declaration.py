"""How a message handler is declared, and what is refused there."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from idempotency import current, idempotent_consumer
from idempotency._rules import Claim
from idempotency.errors import (
    ConfigurationError,
)
from idempotency.stores.memory import MemoryStore
from tests.kit.handlers import id_of


def test_the_handler_looks_like_a_plain_function() -> None:
    """Frameworks see the handler's name and parameters, and none that is given to it."""
    from sqlalchemy import create_engine
    from sqlalchemy.orm import sessionmaker

    from idempotency.stores.sql import SQLStore

    engine = create_engine("sqlite:///records.sqlite3")

    @idempotent_consumer(SQLStore(engine), consumer="c", key=id_of, session=sessionmaker(engine))
    def handle(message: dict[str, Any], session: Any) -> int:
        """Handle."""
        return 1

    assert (handle.__name__, handle.__doc__) == ("handle", "Handle.")  # type: ignore[attr-defined]
    assert list(inspect.signature(handle).parameters) == ["message"]


@pytest.mark.parametrize(
    "options", [{"consumer": ""}, {"max_attempts": 0}, {"on_exhausted": "drop"}, {"on_refused": "ack"}]
)
def test_what_cannot_work_is_refused(options: dict[str, Any]) -> None:
    """Wrong options are refused where the handler is decorated."""

    def handle(message: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigurationError):
        idempotent_consumer(MemoryStore(), **{"consumer": "c", "key": id_of, **options})(handle)


def test_a_session_that_is_not_given_is_refused() -> None:
    """A handler that asks for a session is refused at its decoration, not with each message."""

    async def handle(message: dict[str, Any], session: Any) -> None: ...

    async def optional(message: dict[str, Any], session: Any = None) -> None: ...

    with pytest.raises(ConfigurationError, match="handle has a parameter session, and session= was not given"):
        idempotent_consumer(MemoryStore(), consumer="c", key=id_of)(handle)
    idempotent_consumer(MemoryStore(), consumer="c", key=id_of)(optional)


def test_attempts_need_a_store_that_shows_its_records() -> None:
    """A store with the four verbs alone cannot count."""

    class Store:
        async def claim(self, claim: Claim) -> None: ...

    async def handle(message: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigurationError, match="inspect"):
        idempotent_consumer(Store(), consumer="c", max_attempts=3)(handle)  # type: ignore[arg-type]


def test_an_unknown_option_is_refused() -> None:
    """A misspelt option is not one that is left out."""

    async def handle(message: dict[str, Any]) -> None: ...

    with pytest.raises(TypeError, match="max_attempt"):
        idempotent_consumer(MemoryStore(), consumer="c", max_attempt=3)(handle)  # type: ignore[call-arg]


def test_a_handler_takes_a_message() -> None:
    """A function without a parameter is no handler."""
    with pytest.raises(ConfigurationError, match="message"):
        idempotent_consumer(MemoryStore(), consumer="c", key=id_of)(lambda: None)


def test_records_of_messages_live_for_a_week() -> None:
    """The default time to live is longer than brokers redeliver."""
    seen: list[float] = []

    @idempotent_consumer(MemoryStore(), consumer="c", key=id_of)
    def handle(message: dict[str, Any]) -> None:
        operation = current()
        assert operation is not None
        seen.append(operation._claim.ttl)

    handle({"id": "1"})
    assert seen == [7 * 86400.0]
