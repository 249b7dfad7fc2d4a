"""A store of one file: it passes the contract, and the command line uses what it can do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from idempotency._cli import lookup
from idempotency._cli.commands import app
from idempotency._rules import Claim, State
from idempotency.errors import ConfigurationError
from idempotency.function import idempotent
from idempotency.stores.base import Examining, Housekeeping, Searching, Store, require, supports
from idempotency.testing import StoreContract
from tests.stores.one_file_store import DictStore


class TestContract(StoreContract):
    """The whole contract, by a subclass of one fixture."""

    @pytest.fixture
    def store(self) -> DictStore:
        return DictStore()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> DictStore:
    """A store that the command line opens by its URL, as by a branch of its own in ``open_store``."""
    store, opens = DictStore(), lookup.open_store
    branch: Any = lambda url, **options: store if url.startswith("dict://") else opens(url, **options)  # noqa: E731
    monkeypatch.setattr(lookup, "open_store", branch)
    return store


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--store", "dict://"])


def completed(store: DictStore, state: State, **times: float) -> str:
    """Make a record in ``state``, and return its id."""
    claim = Claim(scope="http:1:anonymous", key="order-7", fingerprint=b"f", **{"lease": 30.0, "ttl": 60.0, **times})

    async def work() -> None:
        await store.claim(claim)
        assert await store.complete(claim, b"result", state)

    asyncio.run(work())
    return claim.id.hex()


def test_what_it_can_do_the_command_line_does(store: DictStore) -> None:
    """A record with a whole id is shown, listed, resolved and forgotten; what is expired is purged."""
    record = completed(store, State.UNKNOWN)

    assert record in command("inspect", "--id", record).stdout
    assert record in command("inspect", "order-7", "--scope", "http:1:anonymous").stdout
    assert command("list").stdout.startswith(f"{record}\tunknown\t")
    assert command("resolve", record, "done").stdout == f"{record} done\n"
    assert command("forget", record, "--yes").stdout == f"{record} forgotten\n"
    completed(store, State.DONE, ttl=0.0)
    assert command("purge").stdout == "purged 1 record\n"
    assert command("schema", "create").stdout == "the schema is there\n"


@pytest.mark.parametrize(
    ("arguments", "capability", "verb"),
    [
        (("doctor",), "Examining", "examine"),
        (("inspect", "order-7"), "Searching", "find"),
        (("inspect", "--id", "0" * 12), "Searching", "find"),
        (("resolve", "0" * 12, "done"), "Searching", "find"),
        (("forget", "0" * 12), "Searching", "find"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_line(
    store: DictStore, arguments: tuple[str, ...], capability: str, verb: str
) -> None:
    """The line names the capability that is missing, and the verb."""
    result = command(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(
        f" needs the capability {capability}, which DictStore does not have: it lacks {verb}\n"
    )


async def test_a_function_runs_once_on_it() -> None:
    """The rest of the library needs nothing but the verbs."""
    runs: list[str] = []

    @idempotent(DictStore(), key=lambda order: order, name="orders")
    async def place(order: str) -> int:
        runs.append(order)
        return len(runs)

    assert [await place("tea"), await place("tea"), await place("milk")] == [1, 1, 2]


def test_a_store_is_asked_by_type() -> None:
    """A capability is a protocol, and so are several in one; what a wrapper passes on counts."""

    class Wrapper:
        def __init__(self, inner: object) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    for store in (DictStore(), Wrapper(DictStore())):
        assert supports(store, Store)
        assert supports(store, Housekeeping)
        assert not supports(store, Searching)
    with pytest.raises(ConfigurationError, match="doctor needs the capability Examining, which DictStore does not"):
        require(DictStore(), Examining, "doctor")


def test_a_function_for_threads_is_refused_with_what_is_missing() -> None:
    """A store without the verbs for threads is refused where the function is defined."""
    with pytest.raises(ConfigurationError, match="it lacks claim_sync, renew_sync, complete_sync, release_sync, close"):

        @idempotent(DictStore(), key=lambda order: order, name="orders")  # type: ignore[arg-type]
        def place(order: str) -> None: ...
