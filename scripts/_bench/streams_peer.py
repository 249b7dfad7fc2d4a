"""eventsourcing beside this library, where it is installed: one event in each transaction, and all of them read."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from sqlalchemy import make_url

installed = find_spec("eventsourcing") is not None

_PAGE = 1000
_STREAM = 100


class Peer:
    """An application of eventsourcing, with its own pool of psycopg."""

    name = "eventsourcing"

    def __init__(self, url: str, writers: int) -> None:
        domain: Any = import_module("eventsourcing.domain")
        application: Any = import_module("eventsourcing.application")

        class Account(domain.Aggregate):  # type: ignore[misc]
            class Changed(domain.Aggregate.Event):  # type: ignore[misc]
                amount: int

                def apply(self, aggregate: Any) -> None:
                    pass

        class Accounts(application.Application):  # type: ignore[misc]
            log_section_size = _PAGE

        place = make_url(url)
        self._account = Account
        self._application = Accounts(
            env={
                "PERSISTENCE_MODULE": "eventsourcing.postgres",
                "POSTGRES_DBNAME": place.database,
                "POSTGRES_HOST": place.host,
                "POSTGRES_PORT": str(place.port or 5432),
                "POSTGRES_USER": place.username,
                "POSTGRES_PASSWORD": place.password or "",
                "POSTGRES_POOL_SIZE": str(writers),
            }
        )

    def append(self, writer: int, events: int) -> None:
        """Append events to a new aggregate, one in a transaction. The one that creates it is the first of them."""
        del writer
        account = self._account()
        self._application.save(account)
        for number in range(1, events):
            account.trigger_event(self._account.Changed, amount=number)
            self._application.save(account)

    def fill(self, events: int) -> None:
        """Append events to new aggregates, a hundred in a transaction."""
        for _ in range(0, events, _STREAM):
            account = self._account()
            for number in range(1, _STREAM):
                account.trigger_event(self._account.Changed, amount=number)
            self._application.save(account)

    def read_all(self) -> int:
        """Read all events as objects, and return how many there are.

        Its projection runner reads the same log and uses the same mapper, in pages of 500, which a thread reads.
        """
        found = start = 0
        while True:
            page = self._application.notification_log.select(start=start + 1, limit=_PAGE)
            for each in page:
                self._application.mapper.to_domain_event(each)
                found += 1
            if len(page) < _PAGE:
                return found
            start = page[-1].id

    def close(self) -> None:
        """Close the pool."""
        self._application.close()
