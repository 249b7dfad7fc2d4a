"""Sagas in a store with encryption: what is read back, by which key, and that nothing of users is in plain text."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest

from idempotency._sagas.journal import Amend, Browse, Due, Leave, Look, Open, Phase, Put, Request, Row, Wake
from idempotency.errors import ConfigurationError, UnreadableError
from idempotency.stores.encryption import Encryption
from idempotency.stores.memory import MemoryStore
from idempotency.stores.redis import RedisStore
from idempotency.testing.journal._journal import by_name, done, leave, opening, rival, write
from tests.kit.redis_store import saga_key

KEY, LATER, LOST = (bytes([number] * 32) for number in range(3))
TEXTS = {"plain-key", "plain-input", "plain-reason", "plain-result", "plain-body", "plain-signal", "plain-amendment"}

OpenStore = Callable[..., RedisStore]


@pytest.fixture
def open_store() -> OpenStore:
    """Open one more store on the same server, with encryption by these keys."""
    server = fakeredis.FakeServer(version=(7,))

    def open_one(*keys: bytes, writes: bool = True, digest_names: bool = False) -> RedisStore:
        encryption = Encryption(*keys, writes=writes) if keys else None
        client = fakeredis.FakeAsyncRedis(server=server)
        return RedisStore(client, encryption=encryption, digest_names=digest_names)

    return open_one


def client_of(store: RedisStore) -> Any:
    """Return the client of a store."""
    return store._clients.here().client


async def use(store: Any) -> Open:
    """Write everything that a saga can hold of its users, and leave the saga due."""
    request = opening("trip", "plain-key", input=b"plain-input")
    await store.journal(request)
    await store.journal(write(request, done(body=b"plain-body"), result=b"plain-result"))
    await store.journal(Put(id=request.id, entry=done("signal", b"plain-signal")))
    await store.journal(leave(request, due=None, wakes=1, reason=b"plain-reason"))
    await store.journal(Amend(id=request.id, entries=[done("by hand", b"plain-amendment")]))
    return request


async def check(store: Any, request: Open) -> None:
    """Assert that everything comes back."""
    saga = await store.journal(Look(id=request.id))

    assert saga is not None
    assert (saga.row.key, saga.row.input) == ("plain-key", b"plain-input")
    assert (saga.row.reason, saga.row.result) == (b"plain-reason", b"plain-result")
    assert {name: entry.body for name, entry in by_name(saga).items()} == {
        "step": b"plain-body",
        "signal": b"plain-signal",
        "by hand": b"plain-amendment",
    }
    signal = await store.journal(Put(id=request.id, entry=done("signal", b"other")))
    assert signal is not None
    assert signal.body == b"plain-signal"
    for rows in (await store.journal(Due(names=["trip"])), await store.journal(Browse(name="trip"))):
        assert [(row.key, row.input, row.reason, row.result) for row in rows] == [
            ("plain-key", b"plain-input", b"plain-reason", b"plain-result")
        ]


@pytest.mark.parametrize(("keys", "expected"), [((), TEXTS), ((KEY,), set())])
async def test_nothing_is_in_plain_text_in_redis(
    open_store: OpenStore, keys: tuple[bytes, ...], expected: set[str]
) -> None:
    """With encryption no key, input, reason, result or body is in any value, or in the name of a key."""
    await use(open_store(*keys))
    client = client_of(open_store())
    stored = [(name, await client.dump(name)) for name in await client.keys("*")]

    assert {text for text in TEXTS if any(text.encode() in part for pair in stored for part in pair)} == expected


@pytest.mark.parametrize(("keys", "expected"), [((), TEXTS), ((KEY,), set())])
async def test_nothing_is_in_plain_text_in_memory(keys: tuple[bytes, ...], expected: set[str]) -> None:
    """Nor in what hangs on a store in memory."""
    store = MemoryStore(encryption=Encryption(*keys) if keys else None)
    await use(store)

    seen: dict[int, bytes] = {}
    pending: list[Any] = [store._sagas._sagas]
    while pending:
        each = pending.pop()
        if id(each) not in seen and not isinstance(each, type):
            seen[id(each)] = each if isinstance(each, bytes) else each.encode() if isinstance(each, str) else b""
            pending += gc.get_referents(each)

    assert {text for text in TEXTS if any(text.encode() in part for part in seen.values())} == expected


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ((KEY,), (KEY,)),
        ((KEY,), (LATER, KEY)),
        ((), (KEY,)),
        ((), ()),
    ],
    ids=["the same key", "a later key", "encryption later", "no encryption"],
)
async def test_everything_comes_back(
    open_store: OpenStore, writer: tuple[bytes, ...], reader: tuple[bytes, ...]
) -> None:
    """A saga is read by a store that has its key, also if that is not the one it writes with, or was in plain text."""
    request = await use(open_store(*writer))

    await check(open_store(*reader), request)


async def test_a_store_that_only_reads(open_store: OpenStore) -> None:
    """A store with ``writes=False`` goes on with an encrypted saga, in plain text."""
    request = await use(open_store(KEY))
    reading = open_store(KEY, writes=False)
    await check(reading, request)
    owner = rival(request)
    await reading.journal(owner)
    await reading.journal(write(owner, done("next", b"in plain text")))

    assert await client_of(reading).hget(saga_key(request), "xnext") == b"in plain text"
    assert by_name(await reading.journal(Look(id=request.id)))["next"].body == b"in plain text"


@pytest.mark.parametrize(
    ("keys", "why"),
    [((LOST,), "was not given"), ((), "has no encryption=")],
    ids=["another key", "no encryption"],
)
async def test_without_the_key(open_store: OpenStore, keys: tuple[bytes, ...], why: str) -> None:
    """Without the key a saga is not read: it is passed over where it hides others, and an operator sees that it is."""
    request = await use(open_store(KEY))
    store = open_store(*keys)
    readable = opening("trip", "readable", lease=0.0)
    await store.journal(readable)

    assert [row.key for row in await store.journal(Due(names=["trip"], limit=1))] == ["readable"]
    readers: list[Request[Any]] = [rival(request), Look(id=request.id), Put(id=request.id, entry=done("signal"))]
    for asked in readers:
        with pytest.raises(UnreadableError, match=why):
            await store.journal(asked)
    rows = await store.journal(Browse(name="trip"))
    assert [(row.key.startswith("(encrypted: "), why in row.key) for row in rows] == [(True, True), (False, False)]
    assert [(row.input, row.reason, row.result) for row in rows] == [(b"", b"", None), (b"input", b"", None)]
    assert await store.journal(Wake(id=request.id))


async def test_envelopes_cannot_be_moved(open_store: OpenStore) -> None:
    """An envelope in the place of another, of the same saga or of another one, is not read."""
    store = open_store(KEY)
    first, second = opening("trip", "1"), opening("trip", "2")
    for request in (first, second):
        await store.journal(request)
        await store.journal(write(request, done("one"), done("two"), result=b"result"))
    client = client_of(store)
    places = [saga_key(first), saga_key(second)]

    for source, source_field, field in (
        (places[0], "xone", "xtwo"),
        (places[0], "z", "i"),
        (places[1], "xone", "xone"),
        (places[1], "i", "i"),
        (places[1], "z", "r"),
    ):
        before = await client.hget(places[0], field)
        await client.hset(places[0], field, await client.hget(source, source_field))
        with pytest.raises(UnreadableError, match="belongs to another record"):
            await store.journal(Look(id=first.id))
        await client.hset(places[0], field, before)
    assert await store.journal(Look(id=first.id)) is not None


async def test_digests_of_names_are_refused(open_store: OpenStore) -> None:
    """A store that stores digests of keys only cannot give a saga its key: nothing is recorded."""
    request = opening("trip")
    memory = MemoryStore(digest_names=True)

    for store in (open_store(digest_names=True), open_store(KEY, digest_names=True), memory):
        with pytest.raises(ConfigurationError, match="without digest_names"):
            await store.journal(request)
        assert await store.journal(Look(id=request.id)) is None


async def test_a_run_that_ends_is_sealed(open_store: OpenStore) -> None:
    """The end of a run writes entries, reason and result as envelopes, and they come back."""
    store, request = open_store(KEY), opening("trip")
    await store.journal(request)
    await store.journal(
        Leave(
            id=request.id,
            token=request.token,
            phase=Phase.UNDONE,
            due=None,
            wakes=0,
            reason=b"reason",
            result=b"result",
            entries=[done()],
            ttl=60.0,
        )
    )

    with pytest.raises(UnreadableError):
        await open_store().journal(Look(id=request.id))
    saga = await store.journal(Look(id=request.id))
    assert saga is not None
    row: Row = saga.row
    assert (row.reason, row.result, by_name(saga)) == (b"reason", b"result", {"step": done()})
