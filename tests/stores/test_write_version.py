"""Stores that write names beside stores that do not, on the same records: each does what the other began."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from idempotency._rules import Execute, Replay, State, judge
from idempotency.errors import ConfigurationError
from idempotency.stores import open_store
from idempotency.stores.encryption import Encryption
from idempotency.testing.contract._claims import SHORT, lapsed, new_claim, rival
from tests.kit.targets import SYNC_KINDS, Target, redis_client

SHARED = pytest.mark.stores("fakeredis", "redis", "redis62", "sqlite", "postgres", "mariadb")
BOTH = pytest.mark.parametrize("first", [1, 2])
KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


@pytest.fixture
async def stores(target: Target) -> AsyncIterator[dict[int, Any]]:
    """A store of each version that is written."""
    async with target.opened() as old, target.opened(write_version=2) as new:
        yield {1: old, 2: new}


@SHARED
@BOTH
async def test_each_does_what_the_other_began(stores: dict[int, Any], first: int) -> None:
    """A record is replayed, renewed, completed, released, taken over and resolved by a store of the other version."""
    one, other = stores[first], stores[3 - first]
    done, freed, over, held = (new_claim(name="charge", lease=SHORT if n == 2 else 30.0) for n in range(4))
    for claim in (done, freed, over, held):
        assert judge(claim, await one.claim(claim)) == Execute(1)
    await lapsed(other, over)
    taken = rival(over)

    assert await other.renew(done)
    assert await other.complete(done, b"done")
    assert await other.release(freed)
    assert judge(taken, await other.claim(taken)) == Execute(2)
    assert not await one.complete(over, b"late")
    assert await one.complete(held, None, State.UNKNOWN)
    assert await other.resolve(held.id, "done", b"found out")

    for store in (one, other):
        assert judge(rival(done), await store.claim(rival(done))) == Replay(b"done")
        assert judge(rival(held), await store.claim(rival(held))) == Replay(b"found out")
        entry, resolved = await store.inspect(over.id), await store.inspect(held.id)
        assert (entry.attempt, entry.name) == (2, "charge")
        assert resolved.name == ("charge" if first == 2 else "")


@pytest.mark.stores(*SYNC_KINDS)
def test_the_blocking_verbs_write_names(target: Target) -> None:
    """By every driver that blocks."""
    with target.opened_sync(write_version=2) as store:
        store.claim_sync(claim := new_claim(name="charge"))
        entry = store.inspect_sync(claim.id)

        assert entry is not None
        assert entry.name == "charge"


@pytest.mark.stores("fakeredis", "redis")
async def test_only_version_2_writes_the_field_in_redis(stores: dict[int, Any], target: Target) -> None:
    """Until it is raised, a hash has the fields that it had; the format that is stored stays the same."""
    claims = {version: new_claim(name="charge") for version in stores}
    for version, claim in claims.items():
        await stores[version].claim(claim)
    async with redis_client(target) as client:
        found = {version: await client.hgetall(f"{target.name}:1:{each.id.hex()}") for version, each in claims.items()}

    assert sorted(found[1]) == [b"a", b"c", b"f", b"h", b"k", b"l", b"n", b"s", b"t", b"v"]
    assert sorted(found[2]) == sorted([*found[1], b"o"])
    assert found[2][b"o"] == b"charge"
    assert (found[1][b"v"], found[2][b"v"]) == (b"1", b"1")


@SHARED
async def test_any_name_is_shown_and_listed(target: Target) -> None:
    """Also one of control characters, surrogates or spaces; the empty name lists the records without one."""
    names = [
        "a\n\0\x1b[31m",
        "\ud800x",
        "\u202exyz",
        "\U0001f511" * 200,
        "charge",
        "charge ",
        "Charge",
        "\\x41\"',{}",
        "",
    ]
    async with target.opened(write_version=2) as store:
        claims = {name: new_claim(name=name) for name in names}
        await asyncio.gather(*map(store.claim, claims.values()))

        for name, claim in claims.items():
            listed = await store.list_records(name=name, limit=1000)
            assert (claim.id, name) in {(each.id, each.name) for each in listed}
            assert {each.name for each in listed} == {name}


@pytest.mark.stores("fakeredis", "sqlite", "postgres", "mariadb")
async def test_a_name_is_not_encrypted(target: Target) -> None:
    """Scope and key are; a name is in clear, so that records can be listed by it without a key."""
    async with target.opened(write_version=2, encryption=Encryption(KEY)) as sealed, target.opened() as plain:
        claims = [new_claim(name="charge") for _ in range(3)]
        await asyncio.gather(*map(sealed.claim, claims))

        found = await plain.list_records(name="charge")

        assert {each.id for each in found} == {claim.id for claim in claims}
        assert {each.key for each in found}.isdisjoint({claim.key for claim in claims})


@pytest.mark.parametrize("version", [0, 3, True])
def test_a_version_that_redis_cannot_write_is_refused(version: Any) -> None:
    """The error says which can be."""
    with pytest.raises(ConfigurationError, match="write_version must be 1 or 2"):
        open_store("redis://localhost", write_version=version)
