"""The contract of the names of operations, for a store that records them."""

from __future__ import annotations

from typing import Protocol

import pytest

from idempotency._rules import State
from idempotency.stores._counts import count_scope
from idempotency.stores._versions import MOST_OF_A_NAME
from idempotency.stores.base import Housekeeping, Listing, Naming, Store, writes_names
from idempotency.testing.contract._claims import (
    OTHER,
    SHORT,
    Contract,
    lapsed,
    new_claim,
    rival,
    wait_until_expired_after,
)


class NamingStore(Store, Housekeeping, Listing, Naming, Protocol):
    """A store that records the names of operations, and lists records by them."""


class NameContract(Contract):
    """Check what is recorded of the name of an operation, and what is listed by it."""

    @pytest.fixture
    def naming(self, store: NamingStore) -> NamingStore:
        """Override to give a store that records names, if ``store`` does not."""
        if not writes_names(store):
            pytest.skip("the store records no names, and the fixture naming is not given")
        return store

    @pytest.mark.parametrize("name", ["POST /orders/{id}", "\u9375 \U0001f511 \\ '", ""], ids=ascii)
    async def test_the_name_is_shown(self, naming: NamingStore, name: str) -> None:
        """A record shows the name of its operation while it runs, and when it is done."""
        claim = new_claim(name=name)
        await naming.claim(claim)
        running = await naming.inspect(claim.id)
        await naming.complete(claim, b"result")
        done = await naming.inspect(claim.id)

        assert running is not None
        assert done is not None
        assert (running.name, done.name) == (name, name)

    async def test_a_long_name_is_cut(self, naming: NamingStore) -> None:
        """Its first characters are shown, and it is listed by the whole name."""
        claim = new_claim(name="n" * 10_000)
        await naming.claim(claim)

        entry = await naming.inspect(claim.id)
        listed = await naming.list_records(name=claim.name, limit=10_000)

        assert entry is not None
        assert entry.name == "n" * MOST_OF_A_NAME
        assert claim.id in {each.id for each in listed}

    async def test_the_name_of_the_last_owner_counts(self, naming: NamingStore) -> None:
        """A claim that takes over a record, or finds it expired, writes its own name; a duplicate does not."""
        claim, gone = new_claim(name="first", lease=SHORT), new_claim(name="first", ttl=SHORT)
        await naming.claim(claim)
        await naming.claim(gone)
        await naming.complete(gone, b"result")
        await lapsed(naming, claim)
        await naming.claim(rival(claim, name="second"))
        await naming.claim(rival(claim, name="third"))
        await wait_until_expired_after(naming, SHORT)
        await naming.claim(rival(gone, name="second", fingerprint=OTHER))

        taken, new = await naming.inspect(claim.id), await naming.inspect(gone.id)

        assert taken is not None
        assert new is not None
        assert (taken.name, taken.attempt) == ("second", 2)
        assert (new.name, new.attempt) == ("second", 1)

    async def test_records_are_listed_by_state(self, naming: NamingStore) -> None:
        """Each record is listed under its state and no other, and in the list of all; counts are in none."""
        name = f"listed {new_claim().key}"
        running, done = new_claim(name=name), new_claim(name=name)
        over, held = new_claim(name=name, lease=SHORT), new_claim(name=name)
        count = new_claim(name=name, scope=count_scope("begun", "contract"), lease=0.0)
        for claim in (running, done, over, held, count):
            await naming.claim(claim)
        await naming.complete(done, b"result")
        await naming.complete(held, None, State.UNKNOWN)
        await lapsed(naming, over)

        found = {
            state: [each.id for each in await naming.list_records(state, name=name)]
            for state in ("running", "done", "lapsed", "unknown", None)
        }

        assert found == {
            "running": [running.id],
            "done": [done.id],
            "lapsed": [over.id],
            "unknown": [held.id],
            None: found[None],
        }
        assert sorted(found[None]) == sorted(each.id for each in (running, done, over, held))

    async def test_records_are_listed_by_name(self, naming: NamingStore) -> None:
        """Only those of the name are listed, the oldest first, at most as many as were asked for."""
        name = f"listed {new_claim().key}"
        claims = [new_claim(name=name) for _ in range(3)]
        for claim in (*claims, new_claim(name="another"), new_claim(name=f"{name} too")):
            await naming.claim(claim)

        every = await naming.list_records(name=name)
        two = await naming.list_records("running", name=name, limit=2)
        none = await naming.list_records("done", name=name)

        assert {each.id for each in every} == {claim.id for claim in claims}
        assert [each.age for each in every] == sorted((each.age for each in every), reverse=True)
        assert [each.name for each in two] == [name, name]
        assert none == []

    async def test_a_name_decides_nothing(self, naming: NamingStore) -> None:
        """Two claims that differ in their names alone are one operation, and a mismatch stays one."""
        claim = new_claim(name="first")
        await naming.claim(claim)
        await naming.complete(claim, b"result")

        same = await naming.claim(rival(claim, name="second"))
        other = await naming.claim(rival(claim, name="first", fingerprint=OTHER))

        assert (same.token, same.result) == (claim.token, b"result")
        assert other.fingerprint == claim.fingerprint
