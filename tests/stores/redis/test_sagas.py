"""The journal of sagas on Redis: its commands, its keys, its indexes, and the sagas it cannot read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis
import redis.asyncio as aioredis
from redis.crc import key_slot

from idempotency._sagas.journal import Amend, Browse, Due, Look, Open, Phase, Purge, Put, Request, Wake
from idempotency.errors import ConfigurationError, StoreError, StoreRefusedError, UnreadableError
from idempotency.stores.redis import RedisStore
from idempotency.stores.redis._sagas import Sagas
from idempotency.stores.redis._wire import Command
from idempotency.testing import ManualClock
from idempotency.testing.journal._journal import begun, done, ending, leave, opening, rival, write
from tests.kit.redis_servers import RedisProcess
from tests.kit.redis_store import saga_key, sent_to
from tests.kit.servers import RedisServer

MIB = 1024**2


def requests_for(request: Open) -> list[Request[Any]]:
    """Make one request of each kind for one saga."""
    return [
        request,
        rival(request, input=None),
        write(request, done()),
        leave(request, done()),
        Put(id=request.id, entry=done("signal")),
        Wake(id=request.id),
        Amend(id=request.id, entries=[done()], without=["signal"]),
        Look(id=request.id),
    ]


@pytest.fixture(params=["journal", "journal_sync"])
def ask(request: pytest.FixtureRequest, store: RedisStore) -> Callable[[Request[Any]], Awaitable[Any]]:
    """The journal of the store: awaited, and in a thread."""
    if request.param == "journal":
        return store.journal

    async def ask(request: Request[Any]) -> Any:
        return await asyncio.to_thread(store.journal_sync, request)

    return ask


async def test_each_request_is_one_command(server: RedisProcess, ask: Callable[[Request[Any]], Awaitable[Any]]) -> None:
    """Every request for one saga is one command; only the first saga of a name needs one more, to note the name."""
    first, second = opening("trip", "1"), opening("trip", "2")
    for request in (opening("other"), *requests_for(opening("other", "2"))):
        await ask(request)  # now the server has every script

    with sent_to(server) as names:
        await ask(first)
    assert names == ["EVALSHA", "EVALSHA"]
    for request in requests_for(second):
        with sent_to(server) as names:
            await ask(request)
        assert names == ["EVALSHA"], request


async def test_rows_are_two_commands(server: RedisProcess, ask: Callable[[Request[Any]], Awaitable[Any]]) -> None:
    """Up to a thousand sagas of a name are read by two commands, and none by one."""
    for number in range(20):
        await ask(opening("trip", f"{number}", lease=0.0))
    assert len(await ask(Due(names=["trip"]))) == 20
    for request, expected in (
        (Due(names=["trip"]), 2),
        (Browse(name="trip"), 2),
        (Due(names=["absent"]), 1),
        (Browse(name="trip", stuck=True), 1),
        (Due(), 3),
        (Purge(), 0),
    ):
        with sent_to(server) as names:
            await ask(request)
        assert names == ["EVALSHA"] * expected, request


async def test_many_rows_are_read_in_parts(store: RedisStore) -> None:
    """More than a thousand sagas of a name are all found."""
    requests = [opening("trip", f"{number}", lease=0.0) for number in range(1005)]
    for part in range(0, 1005, 100):
        await asyncio.gather(*(store.journal(request) for request in requests[part : part + 100]))

    rows = await store.journal(Due(names=["trip"], limit=2000))

    assert len(rows) == 1005
    assert {row.id for row in rows} == {request.id for request in requests}
    assert len({row.id for row in await store.journal(Browse(name="trip", limit=1001))}) == 1001


def first_command(sagas: Sagas, request: Request[Any]) -> Command:
    """Return the first command of a request."""
    return next(sagas.steps(request)).command


def test_a_name_is_noted_again() -> None:
    """A name is noted once a minute, since a server can forget it while this process goes on."""
    clock = ManualClock()
    sagas = Sagas(b"idempotency:1:", None, clock)
    found = []
    for seconds in (0.0, 0.0, 59.0, 1.0, 0.0):
        clock.advance(seconds)
        steps = sagas.steps(opening("trip"))
        first = next(steps).command[0]
        found.append(b"SADD" in first.text)
        if found[-1]:
            steps.send((1, None))

    assert found == [True, False, False, True, False]


@pytest.mark.parametrize("prefix", ["idempotency", "a{b", "a}b{c}", "{{"])
@pytest.mark.parametrize("name", ["trip", "", "{", "}", "{}", "{a}b", "cl\u00e9\U0001f511", "\ud800"])
def test_the_keys_of_a_name_are_in_one_slot(prefix: str, name: str) -> None:
    """Each command has all of its keys in the slot of the name, whatever characters a name or a prefix has."""
    sagas = Sagas(f"{prefix}:1:".encode(), None)
    noting = sagas.steps(opening(name))
    next(noting)
    noting.send((1, None))
    commands = [
        first_command(sagas, each) for key in ("1", "}2{") for each in requests_for(opening(name, key, lease=0.0))
    ]

    keys = {key for _, rest in commands for key in rest[1 : 1 + int(rest[0])]}

    assert len(keys) == 2 + 5
    assert len({key_slot(key) for key in keys}) == 1


async def test_ended_expires_by_redis(store: RedisStore, server: RedisProcess) -> None:
    """Redis itself forgets what has ended, and its indexes with the last of it; what has not ended does not expire."""
    short, long, running = (opening("trip", key) for key in ("short", "long", "running"))
    for request in (short, long, running):
        await store.journal(request)
    await store.journal(ending(long, ttl=60.0))
    await store.journal(ending(short, ttl=30.0))
    await store.journal(write(running, done()))

    with server.client() as client:
        lives = {key: client.pttl(saga_key(long, key)) for key in ("", "ended", "expiries")}
        assert {key: 59_000 < life <= 60_000 for key, life in lives.items()} == dict.fromkeys(lives, True)
        assert 29_000 < client.pttl(saga_key(short)) <= 30_000
        assert client.pttl(saga_key(running)) == -1
        assert client.zrange(saga_key(running, "open"), 0, -1) == [running.id]
        assert client.pttl(saga_key(running, "open")) == -1
        await store.journal(ending(running))
        assert client.exists(*(saga_key(running, index) for index in ("due", "open", "stuck"))) == 0


async def test_indexes_forget_what_has_expired(store: RedisStore, server: RedisProcess) -> None:
    """What has expired is removed from the indexes by the next end of a saga, or when it is looked for."""
    first, gone, last, seen = (opening("trip", key) for key in ("first", "gone", "last", "seen"))
    for request in (first, gone, last, seen):
        await store.journal(request)
    await store.journal(ending(first, ttl=60.0))
    await store.journal(ending(gone, ttl=0.02))
    await _expired(store, gone)
    with server.client() as client:
        await store.journal(ending(last, ttl=60.0))
        for index in ("ended", "expiries"):
            assert set(client.zrange(saga_key(last, index), 0, -1)) == {first.id, last.id}
        await store.journal(ending(seen, ttl=0.02))
        await _expired(store, seen)

        rows = await store.journal(Browse(name="trip", ended=True))

        assert {row.id for row in rows} == {first.id, last.id}
        assert set(client.zrange(saga_key(last, "ended"), 0, -1)) == {first.id, last.id}


async def _expired(store: RedisStore, request: Open) -> None:
    async with asyncio.timeout(10):
        while await store.journal(Look(id=request.id)) is not None:
            await asyncio.sleep(0.005)


async def test_recorded_anew_is_in_the_indexes_once(store: RedisStore, server: RedisProcess) -> None:
    """A saga that is recorded again after it has expired is not in the indexes of what has ended any more."""
    request = opening("trip")
    await store.journal(request)
    await store.journal(ending(request, ttl=0.02))
    await _expired(store, request)
    with server.client() as client:
        # It is there still where others have ended too.
        client.zadd(saga_key(request, "ended"), {request.id: 1})
        client.zadd(saga_key(request, "expiries"), {request.id: 1})

        await store.journal(rival(request))

        assert client.exists(saga_key(request, "ended"), saga_key(request, "expiries")) == 0


async def test_stuck_and_due_are_in_one_index(store: RedisStore, server: RedisProcess) -> None:
    """A saga that is never due is not in the index of due times, and one that is due is not in that of the stuck."""
    request = opening("trip")
    await store.journal(request)
    with server.client() as client:
        indexes = [saga_key(request, index) for index in ("due", "stuck")]
        found = [[client.zcard(index) for index in indexes]]
        await store.journal(leave(request, due=None))
        found.append([client.zcard(index) for index in indexes])
        await store.journal(Wake(id=request.id))
        found.append([client.zcard(index) for index in indexes])

    assert found == [[1, 0], [0, 1], [1, 0]]


async def test_deleted_sagas_hide_no_others(store: RedisStore, server: RedisProcess) -> None:
    """Sagas that somebody has deleted, or overwritten, are passed over, and the first ones leave the index."""
    requests = [opening("trip", f"{number}", lease=0.0) for number in range(6)]
    for request in requests:
        await store.journal(request)
    with server.client() as client:
        client.delete(*map(saga_key, requests[:2]))
        client.set(saga_key(requests[2]), "foreign")
        client.hset(saga_key(requests[3]), "p", "nonsense")
        client.hdel(saga_key(requests[4]), "v")

        for asked in (Due(names=["trip"], limit=1), Browse(name="trip", limit=1), Due()):
            assert [row.id for row in await store.journal(asked)] == [requests[5].id]

        assert client.zcard(saga_key(requests[0], "due")) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, None) for field in "vptofacwb"),
        *((field, "nonsense") for field in "vpoacwdb"),
        *(("p", number) for number in ("0", "5", "nan", "0x1", " 1", "-1")),
    ],
)
async def test_a_damaged_saga_is_unreadable(
    store: RedisStore, server: RedisProcess, field: str, value: str | None
) -> None:
    """A missing field, or a number that is none, makes a saga unreadable, and nothing is written to it."""
    request = opening("trip")
    await store.journal(request)
    with server.client() as client:
        if value is None:
            client.hdel(saga_key(request), field)
        else:
            client.hset(saga_key(request), field, value)
        before = client.hgetall(saga_key(request))

        for asked in requests_for(request):
            with pytest.raises(UnreadableError, match="damaged"):
                await store.journal(asked)

        assert client.hgetall(saga_key(request)) == before


@pytest.mark.parametrize("field", ["n", "k", "i", "r"])
async def test_a_saga_without_its_texts_is_unreadable(store: RedisStore, server: RedisProcess, field: str) -> None:
    """A field that only a reader needs is missed by those who read it."""
    request = opening("trip", lease=0.0)
    await store.journal(request)
    with server.client() as client:
        client.hdel(saga_key(request), field)

    for asked in (rival(request), Look(id=request.id)):
        with pytest.raises(UnreadableError, match="damaged"):
            await store.journal(asked)
    assert await store.journal(Browse(name="trip")) == []


@pytest.mark.parametrize("field", ["estep", "xstep"])
async def test_a_damaged_entry_is_unreadable(store: RedisStore, server: RedisProcess, field: str) -> None:
    """An entry that makes no sense is not passed over: its step could be repeated."""
    request = opening("trip")
    await store.journal(request)
    await store.journal(write(request, begun()))
    with server.client() as client:
        if field == "xstep":
            client.hdel(saga_key(request), field)
        else:
            client.hset(saga_key(request), field, "9 0 1 5 5")

    readers: list[Request[Any]] = [Look(id=request.id), Put(id=request.id, entry=done())]
    for asked in readers:
        with pytest.raises(UnreadableError, match="damaged"):
            await store.journal(asked)


async def test_a_foreign_key_is_unreadable(store: RedisStore, server: RedisProcess) -> None:
    """What somebody else has put in the place of a saga stays as it is."""
    request = opening("trip")
    with server.client() as client:
        client.set(saga_key(request), "foreign")

        for asked in requests_for(request):
            with pytest.raises(UnreadableError, match="damaged"):
                await store.journal(asked)

        assert client.get(saga_key(request)) == b"foreign"


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode", [True, False])
async def test_any_client_setting_reads_bytes(server: RedisProcess, protocol: int, decode: bool) -> None:
    """Replies are bytes with RESP2 and RESP3, and for clients that decode the replies of others."""
    options = {"port": server.port, "protocol": protocol, "decode_responses": decode}
    async with aioredis.Redis(**options) as client:
        with redis.Redis(**options) as blocking:
            store = RedisStore(client, sync_client=blocking)
            request = opening("trip", input=b"\xff", lease=0.0)
            await store.journal(request)
            saga = store.journal_sync(rival(request))
            rows = await store.journal(Due()), store.journal_sync(Browse())

    assert saga is not None
    assert saga.row.input == b"\xff"
    assert ([row.input for row in rows[0]], [row.input for row in rows[1]]) == ([], [b"\xff"])


async def test_records_and_sagas_do_not_mix(store: RedisStore) -> None:
    """Sagas are not listed among the records of a store."""
    await store.journal(opening("trip"))

    assert await store.find() == []
    assert await store.unresolved() == []


async def test_a_saga_that_runs_is_written_while_the_memory_is_full() -> None:
    """A full Redis takes no new saga; what an owner has done is recorded, and its saga ends."""
    with RedisServer("--maxmemory-policy", "noeviction") as server:
        store = RedisStore.from_url(server.url)
        first, second = opening("trip", "1"), opening("trip", "2")
        await store.journal(first)
        await store.journal(second)
        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory", "1kb")

        with pytest.raises(StoreError, match="raise maxmemory"):
            await store.journal(opening("trip", "3"))
        assert await store.journal(write(first, done(), progress=True, result=b"result")) == 0
        assert await store.journal(leave(second, done(), reason=b"why"))
        assert await store.journal(ending(first, result=None))

        saga = await store.journal(Look(id=first.id))
        assert saga is not None
        assert (saga.row.phase, saga.row.result, len(saga.entries)) == (Phase.DONE, b"result", 1)
        await store.aclose()


async def test_a_value_that_redis_does_not_take_is_refused() -> None:
    """A value over ``proto-max-bulk-len`` is not sent, by either client, and the saga stays as it is."""
    with RedisServer("--proto-max-bulk-len", "1mb") as server:
        store = RedisStore.from_url(server.url)
        request, large = opening("trip"), b"x" * (2 * MIB)
        await store.journal(request)
        refused: list[Request[Any]] = [
            opening("trip", "2", input=large),
            write(request, done(body=large)),
            write(request, result=large),
            leave(request, reason=large),
            Put(id=request.id, entry=done("signal", large)),
            Amend(id=request.id, result=large),
        ]
        for each in refused:
            with pytest.raises(StoreRefusedError, match="larger than Redis takes"):
                await store.journal(each)
            with pytest.raises(StoreRefusedError, match="larger than Redis takes"):
                store.journal_sync(each)

        saga = await store.journal(Look(id=request.id))
        assert saga is not None
        assert (saga.row.token, saga.row.wakes, saga.entries) == (request.token, 0, ())
        await store.aclose()


async def test_failures_are_store_errors(mortal: RedisProcess) -> None:
    """A server that is gone is an error of the store, whatever is asked."""
    store = RedisStore.from_url(mortal.url)
    request = opening("trip")
    await store.journal(request)
    mortal.kill()

    for asked in (*requests_for(request), Due(), Browse(name="trip")):
        with pytest.raises(StoreError, match="start the server"):
            await store.journal(asked)
        with pytest.raises(StoreError, match="start the server"):
            store.journal_sync(asked)
    await store.aclose()


async def test_side_without_a_client(server: RedisProcess) -> None:
    """A store that was given one client says so to those who ask the other way."""
    with redis.Redis(port=server.port) as blocking:
        store = RedisStore(blocking)
        assert store.journal_sync(opening("trip")) is not None
        with pytest.raises(ConfigurationError, match=r"redis\.asyncio"):
            await store.journal(opening("trip"))
