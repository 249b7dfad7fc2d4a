"""Encryption at rest: what is read back, by which key, and what nobody can read any more."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import hmac
import pickle
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from idempotency import IdempotencyMiddleware, idempotent, idempotent_consumer, open_store
from idempotency._rules import Claim, State, Unreadable, judge
from idempotency.errors import ConfigurationError, StoreRefusedError, UnreadableError
from idempotency.stores._sealing import sealing_of
from idempotency.stores.encryption import Encryption
from idempotency.stores.memory import MemoryStore
from idempotency.stores.redis import RedisStore
from idempotency.stores.redis import _wire as wire
from idempotency.stores.sql import SQLStore, _find, _limits
from idempotency.testing import StoreContract
from tests.kit.asgi_calls import Effects, call
from tests.kit.ledger import Ledger
from tests.kit.newer import make_newer
from tests.kit.raw_records import raw, write, write_result
from tests.kit.targets import Target

KEY = bytes(range(32))
OLD = bytes(range(32, 64))
LOST = bytes(range(64, 96))
RECORD = bytes.fromhex("00112233445566778899aabbccddeeff" * 2)
# Written by the first release with encryption: every later one must read it.
GOLDEN = bytes.fromhex(
    "e147434d eaab4a5b 000102030405060708090a0b 000102030405060708090a0b"
    "effa1fab5127ee21 0083d1fa0291004e5aaaf4aed8551e62"
)

EVERY_STORE = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")
SQL_STORES = pytest.mark.stores("sqlite", "postgres", "mariadb")

Open = Callable[..., Awaitable[Any]]


@pytest.fixture
async def opened(target: Target) -> AsyncIterator[Open]:
    """Open one more store on the test's records, with these options."""
    async with AsyncExitStack() as stack:

        async def open_one(*keys: bytes, digest_names: bool = False, writes: bool = True) -> Any:
            encryption = Encryption(*keys, writes=writes) if keys else None
            if target.kind == "memory":
                # Another process cannot share its records: this is the same store with other options.
                store = copy.copy(target.open())
                store._sealing = sealing_of(encryption, digest_names)
                return store
            store = open_store(target.url, **target.options, encryption=encryption, digest_names=digest_names)
            stack.push_async_callback(store.aclose)
            return store

        yield open_one


def claimed(key: str = "order-7", scope: str = "contract", **fields: Any) -> Claim:
    return Claim(**{"scope": scope, "key": key, "fingerprint": b"f" * 32, "lease": 30.0, "ttl": 60.0, **fields})


def again(claim: Claim) -> Claim:
    """Return the claim of a duplicate."""
    return claimed(claim.key, claim.scope)


async def done(store: Any, claim: Claim, result: bytes = b"result") -> None:
    """Record an operation with its result."""
    await store.claim(claim)
    assert await store.complete(claim, result)


# The format, and the keys.


def test_the_format_of_an_envelope_stays(monkeypatch):
    """Golden bytes: an envelope of the first release is read, and written byte for byte with the same random bytes."""
    monkeypatch.setattr("idempotency.stores.encryption.os.urandom", lambda size: bytes(range(size)))
    encryption = Encryption(KEY)

    assert encryption.encrypt(RECORD, "result", b"a result") == GOLDEN
    assert Encryption(OLD, KEY).decrypt(RECORD, "result", GOLDEN) == b"a result"


def test_two_envelopes_of_one_value_differ():
    """Equal keys of users cannot be recognised in the store."""
    encryption = Encryption(KEY)

    assert encryption.encrypt(RECORD, "names", b"k") != encryption.encrypt(RECORD, "names", b"k")


def test_the_salt_changes_before_a_key_has_encrypted_too_much(monkeypatch):
    """One AES key encrypts a limited number of messages, whatever the number of records."""
    monkeypatch.setattr("idempotency.stores.encryption._MESSAGES", 3)
    encryption = Encryption(KEY)

    envelopes = [encryption.encrypt(RECORD, "names", b"k") for _ in range(6)]

    assert len({envelope[8:20] for envelope in envelopes}) == 3
    assert {Encryption(KEY).decrypt(RECORD, "names", envelope) for envelope in envelopes} == {b"k"}


@pytest.mark.parametrize("position", range(48 + len(b"a result")))
def test_an_envelope_that_was_changed_is_not_read(position):
    """Whichever byte: of the head, the salt, the nonce, the text or the tag."""
    encryption = Encryption(KEY)
    changed = bytearray(encryption.encrypt(RECORD, "result", b"a result"))
    changed[position] ^= 0x10

    assert encryption.is_envelope(bytes(changed))
    with pytest.raises(UnreadableError):
        encryption.decrypt(RECORD, "result", bytes(changed))


@pytest.mark.parametrize("size", [4, 8, 20, 47, 55])
def test_an_envelope_that_was_cut_is_not_read(size):
    encryption = Encryption(KEY)

    with pytest.raises(UnreadableError):
        encryption.decrypt(RECORD, "result", encryption.encrypt(RECORD, "result", b"a result")[:size])


def test_an_envelope_belongs_to_one_field_of_one_record():
    encryption = Encryption(KEY)
    envelope = encryption.encrypt(RECORD, "names", b"k")

    with pytest.raises(UnreadableError):
        encryption.decrypt(RECORD, "result", envelope)
    with pytest.raises(UnreadableError):
        encryption.decrypt(bytes(32), "names", envelope)


def test_a_new_key_is_accepted_as_text_and_as_bytes():
    from base64 import urlsafe_b64decode

    text = Encryption.new_key()
    envelope = Encryption(text).encrypt(RECORD, "names", b"k")

    assert (len(text), text) != (44, Encryption.new_key())
    assert Encryption(urlsafe_b64decode(text)).decrypt(RECORD, "names", envelope) == b"k"


@pytest.mark.parametrize("key", [b"", b"k" * 31, b"k" * 33, "k" * 32, "not base64 at all!", "é" * 44, 32, None])
def test_another_length_is_not_a_key(key):
    """The message names what is right, and does not contain what was given."""
    with pytest.raises(ConfigurationError) as caught:
        Encryption(key)

    assert str(caught.value) == "an encryption key is 32 bytes, or text that Encryption.new_key() has made"
    assert caught.value.__cause__ is None


def test_one_key_twice_is_a_mistake():
    """Who rotates a key by the same key has not rotated it."""
    with pytest.raises(ConfigurationError, match="are the same"):
        Encryption(KEY, OLD, KEY)


def test_the_keys_are_in_no_text_and_in_no_pickle():
    """The ids of keys are: by them an operator knows which key a record needs."""
    encryption = Encryption(KEY, OLD)

    assert repr(encryption) == "<Encryption writes with {}, reads with {}>".format(*encryption.key_ids)
    assert repr(Encryption(KEY, OLD, writes=False)) == "<Encryption reads with {}, {}>".format(*encryption.key_ids)
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="is not pickled or copied"):
            copied(encryption)


def test_a_file_of_keys_is_read(tmp_path):
    """One key a line; the first one writes."""
    file = tmp_path / "keys"
    keys = [Encryption.new_key(), Encryption.new_key()]
    file.write_text("\n".join(keys) + "\n")

    assert Encryption.from_file(file).key_ids == Encryption(*keys).key_ids


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"\n", "it is empty"), (b"\xff\xfe", "it is not text"), (b"secret", "is 32 bytes")],
)
def test_a_file_without_keys_is_a_mistake(tmp_path, content, message):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigurationError, match=message) as caught:
        Encryption.from_file(file)
    assert "secret" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)

    with pytest.raises(ConfigurationError, match=r"pip install 'asgi-idempotency\[encryption\]'"):
        Encryption(KEY)


@pytest.mark.parametrize("options", [{"encryption": "secret"}, {"digest_names": "yes"}])
def test_an_option_of_another_type_is_a_mistake(options):
    with pytest.raises(ConfigurationError) as caught:
        MemoryStore(**options)
    assert "secret" not in str(caught.value)


# On every store.


@pytest.mark.stores("memory", "redis", "sqlite")
class TestContract(StoreContract):
    """A store that encrypts satisfies the contract."""

    @pytest.fixture
    async def store(self, opened: Open, target: Target) -> Any:
        store = await opened(KEY)
        if target.kind == "memory":
            target.open()._sealing = store._sealing
            return target.open()
        return store

    @pytest.fixture
    async def another(self, opened: Open, target: Target) -> Any:
        return target.open() if target.kind == "memory" else await opened(KEY)

    @pytest.fixture
    def make_newer(self, target: Target) -> Callable[[bytes], Awaitable[None]]:
        return lambda record: make_newer(target, record)


@EVERY_STORE
async def test_what_was_encrypted_is_read_with_the_key(opened):
    """Result, scope and key, with any characters, in any process that has the key."""
    claim = claimed("schlüssel \0 \\e \ud800", "scope \N{SNOWMAN}")
    await done(await opened(KEY), claim, b"\x00\xffresult")
    reader = await opened(OLD, KEY)

    assert (await reader.claim(again(claim))).result == b"\x00\xffresult"
    entry = await reader.inspect(claim.id)
    assert (entry.scope, entry.key, entry.result_size) == (claim.scope, claim.key, 8)


@EVERY_STORE
async def test_records_without_encryption_stay_readable(opened):
    """Encryption is switched on while records of earlier processes live."""
    claim = claimed()
    await done(await opened(), claim)
    store = await opened(KEY)

    assert (await store.claim(again(claim))).result == b"result"
    entry = await store.inspect(claim.id)
    assert (entry.scope, entry.key, entry.result_size) == ("contract", "order-7", 6)


@pytest.mark.stores("redis", "sqlite", "postgres", "mariadb")
@pytest.mark.parametrize("keys", [(), (LOST,)])
async def test_a_record_of_a_missing_key_is_unreadable_and_never_free(opened, keys):
    """With other keys and without any: the duplicate is refused, and an operator sees which key is needed."""
    claim, held = claimed(), claimed("held")
    writer = await opened(KEY)
    await done(writer, claim)
    await writer.claim(held)
    await writer.complete(held, None, State.UNKNOWN)
    reader = await opened(*keys)
    duplicate = again(claim)

    assert isinstance(judge(duplicate, await reader.claim(duplicate)), Unreadable)
    assert isinstance(judge(duplicate, await reader.claim(duplicate)), Unreadable)
    [unresolved] = await reader.unresolved()
    assert unresolved.id == held.id
    [needed] = Encryption(KEY).key_ids
    for entry in await reader.find():
        for shown in (entry.scope, entry.key):
            assert shown.startswith("(encrypted: ")
            assert needed in shown
    assert (await writer.claim(again(claim))).result == b"result"


@EVERY_STORE
async def test_a_result_that_was_moved_to_another_record_is_unreadable(opened, target):
    store, mine, other = await opened(KEY), claimed("mine"), claimed("other")
    await done(store, mine, b"of mine")
    await done(store, other, b"of other")

    await write_result(target, mine.id, await raw(target, other.id, "result"))

    assert not (await store.claim(again(mine))).readable


@EVERY_STORE
async def test_the_owner_of_an_expired_or_abandoned_record_encrypts_it_anew(opened, target):
    """So that nothing of an earlier process, without encryption or with another key, stays in it."""
    abandoned = claimed(lease=0.0)
    await (await opened()).claim(abandoned)
    store, next_owner = await opened(KEY), again(abandoned)

    assert (await store.claim(next_owner)).token == next_owner.token

    for field in ("scope", "key"):
        assert "order" not in str(await raw(target, abandoned.id, field))
    entry = await store.inspect(abandoned.id)
    assert (entry.scope, entry.key, entry.attempt) == ("contract", "order-7", 2)


@EVERY_STORE
async def test_a_key_is_found_in_records_of_every_kind(opened):
    """Encrypted by either key, in plain text, and digested with or without a key."""
    ways = [((KEY,), False), ((OLD,), False), ((), False), ((), True), ((KEY,), True), ((OLD,), True)]
    for number, (keys, digest_names) in enumerate(ways):
        store = await opened(*keys, digest_names=digest_names)
        await done(store, claimed("wanted", f"scope {number}"))
        await done(store, claimed("other", f"scope {number}"))
    finder = await opened(KEY, OLD)

    found = await finder.find(key="wanted")

    assert {entry.id for entry in found} == {claimed("wanted", f"scope {number}").id for number in range(6)}
    assert await finder.find(key="unknown") == []


@SQL_STORES
async def test_a_key_is_found_among_more_records_than_one_search_reads(opened, monkeypatch):
    """Encrypted keys cannot be compared by the database; so pages are read until the end."""
    monkeypatch.setattr(_find, "_MOST", 2)
    store = await opened(KEY)
    for number in range(5):
        await store.claim(claimed("wanted" if number == 4 else "other", f"scope {number}"))

    [found] = await store.find(key="wanted")

    assert found.scope == "scope 4"
    assert len(await store.find(key="other")) == 4


@EVERY_STORE
async def test_encryption_that_only_reads_writes_plain_text(opened):
    """It is deployed before the first one that encrypts, so that no process meets what it cannot read."""
    store, mine, other = await opened(KEY, writes=False), claimed("\0 mine \\"), claimed("other")
    await done(store, mine)
    await done(await opened(KEY), other)

    assert (await (await opened()).claim(again(mine))).result == b"result"
    assert (await store.claim(again(other))).result == b"result"
    assert {entry.key for entry in await store.find()} == {"\0 mine \\", "other"}


@EVERY_STORE
@pytest.mark.parametrize("keys", [(), (KEY,)])
async def test_names_are_stored_as_digests_if_that_is_asked_for(opened, target, keys):
    """With a key, the digests cannot be computed by who reads the store. The kind of record stays readable."""
    store = await opened(*keys, digest_names=True)
    claim = claimed("card 4111", "begun:1:consumer:1:billing")
    await done(store, claim)

    entry = await store.inspect(claim.id)

    kind = "hmac-sha256:" if keys else "sha256:"
    assert entry.scope.startswith(f"begun:1:consumer:1:{kind}")
    assert entry.key.startswith(kind)
    assert (len(entry.key), entry.result_size) == (len(kind) + 64, 6)
    for field in ("scope", "key"):
        stored = str(await raw(target, claim.id, field))
        assert stored.count("4111") + stored.count("billing") == 0
    assert (await store.claim(again(claim))).result == b"result"


async def test_a_fingerprint_of_a_secret_of_ones_own_cannot_be_guessed():
    """Without it, who reads the store computes the digest of each possible amount."""
    store, stored = MemoryStore(encryption=Encryption(KEY)), []

    def compared_by(fingerprint: Callable[[str], bytes | str]) -> Any:
        @idempotent(store, key=lambda amount: "order-7", name=f"pay {len(stored)}", fingerprint=fingerprint)
        async def pay(amount: str) -> None:
            stored.append([record.fingerprint for record in store._records.values()][-1])

        return pay

    await compared_by(lambda amount: amount)("100")
    await compared_by(lambda amount: hmac.digest(b"my own", amount.encode(), "sha256"))("100")

    guessed = hashlib.sha256(b"call:1:100").digest()
    assert [fingerprint == guessed for fingerprint in stored] == [True, False]


@EVERY_STORE
async def test_what_an_operator_resolves_with_is_encrypted(opened, target):
    store, claim = await opened(KEY), claimed()
    await store.claim(claim)
    await store.complete(claim, None, State.UNKNOWN)

    assert await store.resolve(claim.id, "done", b"as found out")

    assert b"as found out" not in await raw(target, claim.id, "result")
    assert (await store.claim(again(claim))).result == b"as found out"


@pytest.mark.stores("memory", "redis")
def test_the_verbs_of_threads_encrypt_too(target):
    encryption = Encryption(KEY)
    store = MemoryStore(encryption=encryption)
    if target.is_redis:
        store = RedisStore.from_url(target.url, prefix=target.name, encryption=encryption)
    _threads_encrypt(store)


@SQL_STORES
def test_the_verbs_of_threads_encrypt_too_in_sql(target):
    import sqlalchemy

    engine = sqlalchemy.create_engine(target.sync_url)
    _threads_encrypt(SQLStore(engine, table=target.name, encryption=Encryption(KEY)))
    engine.dispose()


def _threads_encrypt(store: Any) -> None:
    claim = claimed()
    store.claim_sync(claim)
    assert store.complete_sync(claim, b"result")
    assert store.claim_sync(again(claim)).result == b"result"
    assert store.inspect_sync(claim.id).key == "order-7"
    store._sealing = sealing_of(Encryption(LOST), False)
    assert not store.claim_sync(again(claim)).readable
    store.close()


@pytest.mark.stores("sqlite", "redis")
async def test_the_limit_of_a_result_includes_its_envelope(opened, target, monkeypatch):
    """What is refused is refused before it is sent."""
    monkeypatch.setitem(_limits._LARGEST, "sqlite", wire.SMALL + 40)
    for keys, fits in (((), True), ((KEY,), False)):
        store = await opened(*keys)
        store._largest_result = wire.SMALL + 40
        claim = claimed(str(fits))
        await store.claim(claim)
        if fits:
            assert await store.complete(claim, bytes(wire.SMALL + 20))
        else:
            with pytest.raises(StoreRefusedError):
                await store.complete(claim, bytes(wire.SMALL + 20))


@SQL_STORES
async def test_a_joined_operation_is_encrypted(ledger: Ledger, opened, target):
    """Claim, look and completion in the caller's transaction; a duplicate without the key is refused, and not run."""
    runs = []

    def billing(store: Any) -> Any:
        @idempotent(store, key=lambda number: number, name="bill", session=ledger.sessions)
        async def bill(number: str, session: Any) -> str:
            runs.append(number)
            await session.execute(ledger.insert(number))
            return f"invoice of {number}"

        return bill

    assert await billing(await opened(KEY))("7") == "invoice of 7"
    assert await billing(await opened(OLD, KEY))("7") == "invoice of 7"
    for keys in ((), (LOST,)):
        with pytest.raises(UnreadableError, match="encrypted with another key"):
            await billing(await opened(*keys))("7")

    [entry] = await (await opened(KEY)).find()
    assert (runs, entry.key) == (["7"], "7")
    assert b"invoice" not in await raw(target, entry.id, "result")


# Rotation.


@pytest.mark.stores("redis", "sqlite", "postgres")
async def test_keys_are_rotated_under_load(opened):
    """From no encryption to a first key, and from it to a second: no duplicate misses its result, and none runs again.

    Then the new key alone reads what was recorded last.
    """
    effects = Effects()
    stores = [
        await opened(),
        await opened(OLD, writes=False),
        await opened(OLD),
        await opened(OLD, KEY),
        await opened(KEY, OLD),
    ]
    apps = [IdempotencyMiddleware(effects, store=store) for store in stores]
    # Deployments overlap: meanwhile a retry meets a process of the step before, or of the step after.
    stages = [pair for step in range(4) for pair in ((step, step), (step, step + 1), (step + 1, step))]
    stage, operations, replayed, other = 0, 0, 0, 0

    async def client(name: int) -> None:
        nonlocal operations, replayed, other
        number = 0
        while stage < len(stages):
            here, there = stages[stage]
            number += 1
            first = await call(apps[here], key=f"{name}-{number}")
            operations += 1
            for app in (apps[here], apps[there]):
                retry = await call(app, key=f"{name}-{number}")
                replayed += retry.replayed and (retry.status, retry.body) == (first.status, first.body)
                other += not retry.replayed

    async with asyncio.TaskGroup() as tasks:
        for name in range(4):
            tasks.create_task(client(name))
        while stage < len(stages):
            enough = operations + 4
            while operations < enough:
                await asyncio.sleep(0.001)
            stage += 1
    oldest, last = await call(apps[-1], key="0-1"), await call(apps[-1], key="last")

    assert (effects.runs, replayed, other, oldest.replayed) == (operations + 1, 2 * operations, 0, True)
    retry = await call(IdempotencyMiddleware(effects, store=await opened(KEY)), key="last")
    assert (retry.replayed, retry.body) == (True, last.body)


@EVERY_STORE
async def test_after_a_key_is_lost_every_duplicate_is_refused(opened):
    """With ``record-unreadable`` and the event ``unreadable``; the handler does not run."""
    events: list[Any] = []
    await call(IdempotencyMiddleware(Effects(), store=await opened(LOST)), key="k")
    for keys in ((), (KEY,)):
        effects = Effects()
        app = IdempotencyMiddleware(effects, store=await opened(*keys), on_event=events.append)

        replies = [await call(app, key="k") for _ in range(2)]

        assert [(reply.status, reply.code) for reply in replies] == [(500, "record-unreadable")] * 2
        assert effects.runs == 0
    assert [event.kind for event in events] == ["unreadable"] * 4


async def test_a_message_whose_record_is_unreadable_becomes_a_dead_letter():
    store = MemoryStore(encryption=Encryption(LOST))
    runs = []

    @idempotent_consumer(store, consumer="billing", key=lambda message: message)
    async def handle(message: str) -> str:
        runs.append(message)
        return "billed"

    await handle.deliver("1")
    store._sealing = sealing_of(Encryption(KEY), False)
    settlement = await handle.deliver("1")

    assert (type(settlement).__name__, settlement.reason, runs) == ("DeadLetter", "record-unreadable", ["1"])


@EVERY_STORE
async def test_doctor_says_which_keys_are_used_and_which_are_missing(opened, target):
    await done(await opened(LOST), claimed())
    store = await opened(KEY, OLD)
    findings = [(each.level, each.what) for each in await store.examine()]

    writes, reads = Encryption(KEY, OLD).key_ids
    assert ("ok", f"encryption: writes with {writes}, reads with {reads}") in findings
    missing = "records that are encrypted with a key that was not given: 1 or more; their duplicates are refused"
    if target.kind != "memory":
        assert ("fix", missing) in findings
        assert ("note", missing) in [(each.level, each.what) for each in await (await opened()).examine()]


@pytest.mark.stores("redis", "sqlite", "postgres", "mariadb")
async def test_doctor_goes_on_where_a_record_is_damaged(opened, target):
    """Its first bytes no longer say that it is encrypted, or it is no base64."""
    store, claim = await opened(KEY), claimed()
    await store.claim(claim)
    stored = await raw(target, claim.id, "key")
    await write(target, claim.id, "key", b"\xe2" + stored[1:] if target.is_redis else f"\\eX{stored[3:]}")

    findings = [(each.level, each.what) for each in await store.examine()]

    assert ("ok", f"encryption: writes with {store._sealing.encryption.key_ids[0]}") in findings
    unread = "whether records need another encryption key is not known: the record "
    missing = "records that are encrypted with a key that was not given: 1 or more"
    assert any(what.startswith((unread, missing)) for _, what in findings)


@pytest.mark.stores("redis")
@pytest.mark.parametrize("keys", [(), (KEY,)])
async def test_counts_are_read_where_their_names_are_damaged(opened, target, keys):
    """A message is delivered, and an operator sees the record: names are for people only."""
    store, claim = await opened(KEY), claimed(lease=0.0)
    await store.claim(claim)
    await store.claim(again(claim))
    for field in ("key", "scope"):
        await write(target, claim.id, field, b"\xe2" + (await raw(target, claim.id, field))[1:])
        found = await (await opened(*keys)).inspect(claim.id)
        assert (found.attempt, found.key == "order-7") == (2, False)
