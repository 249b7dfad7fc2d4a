"""Functions under a lease: on every kind of store, synchronous and not."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest

from idempotency import Operation, Policy, current, drain, idempotent
from idempotency._rules import Claim, Execute, State, judge
from idempotency.errors import (
    ConfigurationError,
    InProgressError,
    KeyInvalidError,
    KeyMissingError,
    KeyReusedError,
    NotReplayableError,
    OutcomeUnknownError,
    RecordedFailureError,
    StoreError,
    TransactionError,
    UnreadableError,
)
from idempotency.events import Event
from idempotency.stores.memory import MemoryStore
from idempotency.testing import ManualClock

everywhere = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")


@dataclass
class Charge:
    order: int
    amount: int


def the_operation() -> Operation:
    """Return the running operation, which there must be."""
    operation = current()
    assert operation is not None
    return operation


class Broken(MemoryStore):
    """A store that fails at the verbs in ``broken``, and takes them if ``applies``."""

    def __init__(self, *broken: str) -> None:
        super().__init__()
        self.broken = set(broken)

    async def claim(self, claim: Claim, /) -> Any:
        return self.claim_sync(claim)

    def claim_sync(self, claim: Claim, /) -> Any:
        if "claim" in self.broken:
            raise StoreError("away")
        return super().claim_sync(claim)

    async def complete(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        return self.complete_sync(claim, result, state)

    def complete_sync(self, claim: Claim, result: bytes | None, /, state: State = State.DONE) -> bool:
        if "complete" in self.broken:
            raise StoreError("away")
        return super().complete_sync(claim, result, state)


@everywhere
async def test_a_repeated_call_gets_the_recorded_result(store: Any) -> None:
    """Two calls under one key have one effect and one result; another key is another call."""
    effects: list[int] = []

    @idempotent(store, key=lambda order, amount: f"charge:{order}")
    async def charge(order: int, amount: int) -> Charge:
        effects.append(amount)
        return Charge(order, amount)

    assert await charge(1, 5) == await charge(1, amount=5) == Charge(1, 5)
    assert await charge(2, 7) == Charge(2, 7)
    assert effects == [5, 7]


@everywhere
def test_a_repeated_call_gets_the_recorded_result_in_threads(sync_store: Any) -> None:
    """The same holds for a synchronous function, over the store's blocking verbs."""
    effects: list[int] = []

    @idempotent(sync_store, key=lambda order, amount: f"charge:{order}")
    def charge(order: int, amount: int) -> Charge:
        effects.append(amount)
        return Charge(order, amount)

    assert charge(1, 5) == charge(1, amount=5) == Charge(1, 5)
    assert charge(2, 7) == Charge(2, 7)
    assert effects == [5, 7]


@everywhere
async def test_a_concurrent_call_is_told_that_it_runs(store: Any) -> None:
    """A call while the first one runs is refused, with the time after which to ask again."""
    running, finish = asyncio.Event(), asyncio.Event()

    @idempotent(store, key=lambda: "k", policy=Policy(lease=60))
    async def work() -> str:
        running.set()
        await finish.wait()
        return "done"

    first = asyncio.create_task(work())
    await running.wait()
    with pytest.raises(InProgressError) as refused:
        await work()
    finish.set()

    assert 1 <= refused.value.retry_after <= 5
    assert 50 < refused.value.lease_left <= 60
    assert await first == await work() == "done"


@everywhere
def test_a_concurrent_call_in_a_thread_may_wait(sync_store: Any) -> None:
    """A synchronous duplicate waits for the result as long as the policy lets it."""
    running, finish = threading.Event(), threading.Event()

    def work() -> str:
        running.set()
        assert finish.wait(20)
        return "done"

    first = idempotent(sync_store, key=lambda: "k")(work)
    patient = idempotent(sync_store, key=lambda: "k", policy=Policy(wait=20))(work)
    with ThreadPoolExecutor(2) as pool:
        owner = pool.submit(first)
        assert running.wait(20)
        with pytest.raises(InProgressError):
            first()
        waiter = pool.submit(patient)
        finish.set()

        assert owner.result(20) == waiter.result(20) == "done"


async def test_a_concurrent_call_may_wait() -> None:
    """An asynchronous duplicate waits for the result as long as the policy lets it."""
    running, finish = asyncio.Event(), asyncio.Event()

    @idempotent(MemoryStore(), key=lambda: "k", policy=Policy(wait=20))
    async def work() -> str:
        running.set()
        await finish.wait()
        return "done"

    calls = [asyncio.create_task(work()) for _ in range(4)]
    await running.wait()
    finish.set()

    assert await asyncio.gather(*calls) == ["done"] * 4


@everywhere
async def test_another_use_of_the_key_is_refused(store: Any) -> None:
    """With a fingerprint, a call that asks for something else under the key is refused."""

    @idempotent(store, key=lambda order, amount: "k", fingerprint=lambda order, amount: f"{amount}")
    async def charge(order: int, amount: int) -> int:
        return amount

    assert await charge(1, 5) == 5
    with pytest.raises(KeyReusedError):
        await charge(1, 6)
    assert await charge(2, 5) == 5


@everywhere
async def test_a_lapsed_lease_loses_the_record(store: Any) -> None:
    """An owner that could not renew is told; once another took over, its result is refused and the other's is given."""
    events: list[str] = []
    runs: list[int] = []

    class Unrenewable:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        async def renew(self, claim: Claim) -> bool:
            raise StoreError("away")

    def decorated(on: Any, **options: Any) -> Any:
        @idempotent(on, key=lambda: "k", on_event=lambda event: events.append(event.kind), **options)
        async def work() -> str:
            runs.append(the_operation().attempt)
            if len(runs) == 1:
                await the_operation().lost
                assert the_operation().lost
                return f"late, {await patient()}"
            return "other"

        return work

    patient = decorated(store, policy=Policy(wait=20))

    assert await decorated(Unrenewable(), policy=Policy(lease=0.3))() == "other"
    assert runs == [1, 2]
    assert events == ["lease-lost", "stored", "superseded", "replayed"]


@everywhere
def test_a_lapsed_lease_loses_the_record_in_threads(sync_store: Any) -> None:
    """The same holds for a synchronous function."""
    events: list[str] = []
    runs: list[int] = []

    class Unrenewable:
        def __getattr__(self, name: str) -> Any:
            return getattr(sync_store, name)

        def renew_sync(self, claim: Claim) -> bool:
            raise StoreError("away")

    def decorated(on: Any, **options: Any) -> Any:
        @idempotent(on, key=lambda: "k", on_event=lambda event: events.append(event.kind), **options)
        def work() -> str:
            runs.append(the_operation().attempt)
            if len(runs) == 1:
                told = f"late, {patient()}"
                assert the_operation().lost
                return told
            return "other"

        return work

    patient = decorated(sync_store, policy=Policy(wait=20))

    assert decorated(Unrenewable(), policy=Policy(lease=0.3))() == "other"
    assert runs == [1, 2]
    assert sorted(events) == ["lease-lost", "replayed", "stored", "superseded"]


@pytest.mark.parametrize(
    ("policy", "told", "kind"),
    [
        (Policy(), None, "released"),
        (Policy(outcomes={LookupError: "store"}), RecordedFailureError, "stored"),
        (Policy(outcomes={LookupError: "hold"}), OutcomeUnknownError, "held"),
        (Policy(outcomes={ValueError: "hold"}), None, "released"),
    ],
)
async def test_exceptions_follow_the_policy(policy: Policy, told: type[Exception] | None, kind: str) -> None:
    """An exception releases the key, or is recorded by its name, or leaves the key unknown; async and sync alike."""
    events: list[Event] = []
    fails = {"async": True, "sync": True}

    def fail(which: str) -> str:
        if fails.pop(which, False):
            raise KeyError("private")
        return "done"

    @idempotent(MemoryStore(), key=lambda: "k", policy=policy, on_event=events.append)
    async def asynchronous() -> str:
        return fail("async")

    @idempotent(MemoryStore(), key=lambda: "k", policy=policy, on_event=events.append)
    def synchronous() -> str:
        return fail("sync")

    with pytest.raises(KeyError):
        await asynchronous()
    with pytest.raises(KeyError):
        synchronous()
    assert [(event.kind, event.error) for event in events] == [(kind, "KeyError")] * 2
    if told is None:
        assert await asynchronous() == synchronous() == "done"
        return
    with pytest.raises(told) as again:
        await asynchronous()
    with pytest.raises(told):
        synchronous()
    assert told is not RecordedFailureError or "KeyError" in str(again.value)
    assert "private" not in str(again.value)


async def test_the_word_of_the_function_counts() -> None:
    """``hold()`` before an exception keeps the key, ``release()`` frees it after a success."""
    runs: list[str] = []

    @idempotent(MemoryStore(), key=lambda word: word)
    async def work(word: str) -> str:
        runs.append(word)
        if word == "release":
            the_operation().release()
            return word
        the_operation().hold()
        raise ValueError(word)

    assert await work("release") == await work("release") == "release"
    with pytest.raises(ValueError, match="hold"):
        await work("hold")
    with pytest.raises(OutcomeUnknownError):
        await work("hold")
    assert runs == ["release", "release", "hold"]


@pytest.mark.parametrize("on_crash", ["rerun", "hold"])
async def test_a_cancelled_call_follows_on_crash(on_crash: Any) -> None:
    """A cancellation is like a crash: the key is free again, or unknown."""
    running = asyncio.Event()

    @idempotent(MemoryStore(), key=lambda: "k", policy=Policy(on_crash=on_crash))
    async def work() -> str:
        if not running.is_set():
            running.set()
            await asyncio.Event().wait()
        return "done"

    task = asyncio.create_task(work())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    if on_crash == "rerun":
        assert await work() == "done"
    else:
        with pytest.raises(OutcomeUnknownError):
            await work()


async def test_a_store_that_is_away_refuses_or_lets_through() -> None:
    """Without its store a function does not run, unless the policy says so; then it runs as if undecorated."""
    events: list[str] = []
    store = Broken("claim")
    opened = Policy(on_store_error="fail_open")

    def hook(event: Event, /) -> None:
        events.append(event.kind)

    @idempotent(store, key=lambda: "k", on_event=hook)
    async def closed() -> None:
        raise AssertionError("it must not run")

    @idempotent(store, key=lambda: "k", on_event=hook)
    def closed_sync() -> None:
        raise AssertionError("it must not run")

    @idempotent(store, key=lambda fail: "k", on_event=hook, policy=opened)
    async def open_async(fail: bool) -> str:
        assert current() is None
        if fail:
            raise KeyError("its own")
        return "ran"

    @idempotent(store, key=lambda fail: "k", on_event=hook, policy=opened)
    def open_sync(fail: bool) -> str:
        assert current() is None
        if fail:
            raise KeyError("its own")
        return "ran"

    with pytest.raises(StoreError):
        await closed()
    with pytest.raises(StoreError):
        closed_sync()
    assert await open_async(False) == open_sync(False) == "ran"
    with pytest.raises(KeyError):
        await open_async(True)
    with pytest.raises(KeyError):
        open_sync(True)
    assert events == ["unavailable"] * 2 + ["unprotected"] * 4


class Fading(Broken):
    """A store that fails from the third claim on."""

    claims = 0

    def claim_sync(self, claim: Claim, /) -> Any:
        self.claims += 1
        if self.claims > 2:
            raise StoreError("away")
        return super().claim_sync(claim)


async def test_a_duplicate_whose_wait_fails_never_runs() -> None:
    """Also where the policy lets calls through without a store: that another owner runs is known by then."""
    runs: list[bool] = []
    events: list[str] = []
    policy = Policy(on_store_error="fail_open", wait=5)

    @idempotent(Fading(), key=lambda first: "k", policy=policy, on_event=lambda event: events.append(event.kind))
    async def asynchronous(first: bool) -> str:
        runs.append(first)
        with pytest.raises(StoreError):
            await asynchronous(False)
        return "done"

    @idempotent(Fading(), key=lambda first: "k", policy=policy, on_event=lambda event: events.append(event.kind))
    def synchronous(first: bool) -> str:
        runs.append(first)
        with pytest.raises(StoreError):
            synchronous(False)
        return "done"

    assert await asynchronous(True) == synchronous(True) == "done"
    assert runs == [True, True]
    assert events == ["unavailable", "stored"] * 2


def _returns_an_unknown() -> Broken:
    raise AssertionError("it must not run")


async def test_a_store_error_after_the_effect_is_no_failure() -> None:
    """A result that cannot be recorded is returned all the same."""
    events: list[str] = []
    stores = [Broken("complete"), Broken("complete")]

    @idempotent(stores[0], key=lambda: "k", on_event=lambda event: events.append(event.kind))
    async def asynchronous() -> str:
        return "done"

    @idempotent(stores[1], key=lambda: "k", on_event=lambda event: events.append(event.kind))
    def synchronous() -> str:
        return "done"

    assert await asynchronous() == synchronous() == "done"
    assert events == ["unrecorded", "unrecorded"]
    with pytest.raises(InProgressError):
        synchronous()
    for store in stores:
        store.broken.clear()
    await drain()


async def test_a_result_that_cannot_be_kept_is_returned() -> None:
    """A result of the wrong type, or too large, is returned; later calls are told that the operation is completed."""
    events: list[tuple[str, str]] = []

    def hook(event: Event, /) -> None:
        events.append((event.kind, event.error))

    @idempotent(MemoryStore(), key=lambda: "k", on_event=hook)
    def wrong() -> int:
        return "five"  # type: ignore[return-value]

    @idempotent(MemoryStore(), key=lambda: "k", on_event=hook, policy=Policy(max_response=10))
    async def large() -> str:
        return "x" * 11

    assert wrong() == "five"  # type: ignore[comparison-overlap]
    assert await large() == "x" * 11
    with pytest.raises(NotReplayableError):
        wrong()
    with pytest.raises(NotReplayableError):
        await large()
    assert events == [
        ("stored-without-result", "TypeError"),
        ("stored-without-result", "ResultTooLarge"),
        ("completed", ""),
        ("completed", ""),
    ]


@pytest.mark.parametrize(
    ("annotation", "value", "kind"),
    [
        (None, Charge(1, 5), "Charge"),
        (None, [{"at": datetime(2026, 1, 1)}], "datetime"),
        (None, (1,), "tuple"),
        (Any, Charge(1, 5), "Charge"),
        (object, Decimal(1), "Decimal"),
        (dict, {"a": Decimal(1)}, "Decimal"),
        (dict[str, Any], {"a": b"x"}, "bytes"),
        (list[Any] | None, [Charge(1, 5)], "Charge"),
        (Charge | dict[str, Any], {"a": b"x"}, "bytes"),
        (list[Any] | dict[str, Any] | None, {"a": Decimal(1)}, "Decimal"),
    ],
)
async def test_a_result_that_no_annotation_names_is_an_error_of_the_first_call(
    annotation: Any, value: Any, kind: str
) -> None:
    """The error names function, type and remedy, and says that the effect has happened: the key is completed."""
    events: list[tuple[str, str]] = []
    runs: list[str] = []

    def hook(event: Event, /) -> None:
        events.append((event.kind, event.error))

    async def charge():
        runs.append("async")
        return value

    def refund():
        runs.append("sync")
        return value

    if annotation is not None:
        charge.__annotations__["return"] = refund.__annotations__["return"] = annotation
    decorated = idempotent(MemoryStore(), key=lambda: "k", on_event=hook)
    asynchronous, synchronous = decorated(charge), decorated(refund)

    with pytest.raises(ConfigurationError, match=rf"charge returned a {kind}, .* -> {kind}, or give codec=.*happened"):
        await asynchronous()
    with pytest.raises(ConfigurationError, match=rf"refund returned a {kind}, .* -> {kind}, or give codec=.*happened"):
        synchronous()
    with pytest.raises(NotReplayableError):
        await asynchronous()
    with pytest.raises(NotReplayableError):
        synchronous()
    assert runs == ["async", "sync"]
    assert events[:2] == [("stored-without-result", "ConfigurationError")] * 2


def test_a_key_that_json_does_not_know_is_named() -> None:
    """No annotation makes it one, so the remedy is another: the keys."""

    @idempotent(MemoryStore(), key=lambda: "k")
    def totals():
        return {1: "a"}

    with pytest.raises(ConfigurationError, match=r"returned a dict with a key of type int, .* keys be text, or"):
        totals()


@pytest.mark.parametrize("value", [float("nan"), 10**5000, "x" * 11], ids=["nan", "number", "text"])
async def test_data_that_cannot_be_recorded_is_returned_without_an_annotation(value: Any) -> None:
    """NaN, an endless number and a long text are of a type that needs no annotation: the first call returns them."""

    @idempotent(MemoryStore(), key=lambda: "k", policy=Policy(max_response=10))
    async def work():
        return value

    assert await work() is value
    with pytest.raises(NotReplayableError):
        await work()


def test_an_unreadable_record_is_not_repeated() -> None:
    """A function whose result changed its type does not run again over an older record."""
    store, runs = MemoryStore(), []

    @idempotent(store, key=lambda: "k", name="work")
    def before() -> str:
        return "five"

    @idempotent(store, key=lambda: "k", name="work")
    def after() -> int:
        runs.append(1)
        return 5

    before()
    with pytest.raises(UnreadableError):
        after()
    assert runs == []


async def test_nested_operations_are_independent() -> None:
    """A function inside another one on the same store has a record of its own, and each sees its own operation."""
    store = MemoryStore()
    seen: list[str] = []

    @idempotent(store, key=lambda part: f"part:{part}")
    async def inner(part: str) -> str:
        seen.append(the_operation().key)
        return part

    @idempotent(store, key=lambda: "outer")
    async def outer() -> list[str]:
        parts = list(await asyncio.gather(*map(inner, "abc")))
        seen.append(the_operation().key)
        return parts

    assert current() is None
    assert await outer() == await outer() == ["a", "b", "c"]
    assert await inner("a") == "a"
    assert current() is None
    assert sorted(seen[:3]) == ["part:a", "part:b", "part:c"]
    assert seen[3:] == ["outer"]


async def test_the_operation_is_seen_in_tasks_and_threads_below() -> None:
    """Code in a task, in ``to_thread`` or in a copied context sees the operation it runs under."""

    @idempotent(MemoryStore(), key=lambda: "k")
    async def work() -> list[str]:
        async def in_task() -> str:
            return the_operation().derive("mail")

        context = contextvars.copy_context()
        with ThreadPoolExecutor(1) as pool:
            return [
                the_operation().derive("mail"),
                await asyncio.create_task(in_task()),
                await asyncio.to_thread(lambda: the_operation().derive("mail")),
                pool.submit(context.run, lambda: the_operation().derive("mail")).result(),
            ]

    assert len(set(await work())) == 1


@pytest.mark.skipif(getattr(sys.flags, "thread_inherit_context", False), reason="here threads inherit the context")
def test_a_plain_thread_sees_no_operation() -> None:
    """A ``threading.Thread`` begins with an empty context."""
    seen: list[Operation | None] = []

    @idempotent(MemoryStore(), key=lambda: "k")
    def work() -> None:
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join(20)

    work()
    assert seen == [None]


def test_an_operation_without_a_session_says_so() -> None:
    """``current().session`` needs ``session=``."""

    @idempotent(MemoryStore(), key=lambda: "k")
    def work() -> None:
        the_operation().session.execute("SELECT 1")

    with pytest.raises(TransactionError, match="session="):
        work()


def test_methods_work() -> None:
    """A decorated method gets its object, in the key too."""

    class Till:
        def __init__(self, name: str) -> None:
            self.name = name
            self.charges = 0

        @idempotent(MemoryStore(), key=lambda self, order: f"{self.name}:{order}")
        def charge(self, order: int) -> int:
            self.charges += 1
            return self.charges

    first, second = Till("a"), Till("b")

    assert [first.charge(1), first.charge(1), first.charge(2), second.charge(1)] == [1, 1, 2, 1]


def test_the_decorated_function_looks_the_same() -> None:
    """Name, documentation, signature and kind are those of the function, without a session it is given."""

    def sync(order: int, *, dry: bool = False) -> int:
        """Charge."""
        return order

    async def asynchronous(order: int) -> int:
        return order

    decorated = idempotent(MemoryStore(), key=lambda order, dry=False: "k")(sync)

    assert (decorated.__name__, decorated.__doc__) == ("sync", "Charge.")
    assert inspect.signature(decorated) == inspect.signature(sync)
    assert not inspect.iscoroutinefunction(decorated)
    assert inspect.iscoroutinefunction(idempotent(MemoryStore(), key=lambda order: "k")(asynchronous))


@pytest.mark.parametrize("key", [None, ""])
def test_a_missing_key_is_never_invented(key: Any) -> None:
    """A call without a key does not run."""

    @idempotent(MemoryStore(), key=lambda: key)
    def work() -> None:
        raise AssertionError("it must not run")

    with pytest.raises(KeyMissingError):
        work()


def test_what_cannot_work_is_refused() -> None:
    """Wrong kinds of key, fingerprint, store and function are refused before anything runs."""

    def generator() -> Any:
        yield 1

    async def async_generator() -> Any:
        yield 1

    with pytest.raises(KeyInvalidError, match="text"):
        idempotent(MemoryStore(), key=lambda: 5)(lambda: None)()  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigurationError, match="fingerprint"):
        idempotent(MemoryStore(), key=lambda: "k", fingerprint=lambda: 5)(lambda: None)()  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigurationError, match="open_store"):
        idempotent("memory://", key=lambda: "k")(lambda: None)  # type: ignore[arg-type]
    for function in (generator, async_generator):
        with pytest.raises(ConfigurationError, match="generator"):
            idempotent(MemoryStore(), key=lambda: "k")(function)
    with pytest.raises(ConfigurationError, match="codec="):
        idempotent(MemoryStore(), key=lambda: "k")(_returns_an_unknown)


def test_an_expired_result_is_forgotten() -> None:
    """After the time to live the function runs again."""
    clock = ManualClock()
    runs: list[int] = []

    @idempotent(MemoryStore(clock=clock), key=lambda: "k", policy=Policy(ttl=10))
    def work() -> int:
        runs.append(1)
        return len(runs)

    assert [work(), work()] == [1, 1]
    clock.advance(11)
    assert work() == 2


def test_one_function_in_several_event_loops() -> None:
    """A function of a module is used from any number of event loops, one after another and at once."""
    store = MemoryStore()

    @idempotent(store, key=lambda key: key, policy=Policy(wait=20))
    async def work(key: str) -> str:
        await asyncio.sleep(0)
        return key

    assert asyncio.run(work("a")) == asyncio.run(work("a")) == "a"
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: asyncio.run(work("b")), range(8))) == ["b"] * 8


@everywhere
async def test_a_forgotten_key_runs_again(store: Any) -> None:
    """``forget`` removes a finished record, and never one that is being run."""
    claim, again = (Claim(scope="s", key="k", fingerprint=b"f", lease=30, ttl=60) for _ in range(2))
    assert not await store.forget(claim.id)
    await store.claim(claim)
    assert not await store.forget(claim.id)
    await store.complete(claim, b"result")

    assert await store.forget(claim.id)

    assert judge(again, await store.claim(again)) == Execute(1)


@everywhere
def test_a_forgotten_key_runs_again_in_threads(sync_store: Any) -> None:
    """The same holds for the blocking verb, and for a record whose outcome is unknown."""
    claim, again = (Claim(scope="s", key="k", fingerprint=b"f", lease=30, ttl=60) for _ in range(2))
    sync_store.claim_sync(claim)
    sync_store.complete_sync(claim, None, State.UNKNOWN)

    assert sync_store.forget_sync(claim.id)
    assert not sync_store.forget_sync(claim.id)

    assert judge(again, sync_store.claim_sync(again)) == Execute(1)


async def test_a_coroutine_function_around_a_function_is_awaited() -> None:
    """Also where functools.wraps shows through it that the function itself is not, as of one that runs in a thread."""

    def charge(order: str) -> str:
        runs.append(order)
        return f"charged {order}"

    @functools.wraps(charge)
    async def in_a_thread(order: str) -> str:
        return await asyncio.to_thread(charge, order)

    runs: list[str] = []
    call: Any = idempotent(MemoryStore(), key=str)(in_a_thread)

    assert [await call("A-1"), await call("A-1")] == ["charged A-1", "charged A-1"]
    assert runs == ["A-1"]


def _retrying(function: Any) -> Any:
    """Decorate without functools.wraps, which hides that the function is awaited."""
    return lambda *args: function(*args)


async def _charging(key: str) -> str:
    raise ValueError("provider away")


def _counting(key: str) -> Any:
    yield key


@pytest.mark.parametrize("function", [_charging, _counting])
def test_a_result_that_is_work_yet_to_be_done_is_refused(function: Any) -> None:
    """A coroutine or generator that a wrapper returns is not recorded as done; the key is free again."""
    events: list[str] = []
    call = idempotent(MemoryStore(), key=str, name="charge", on_event=lambda event: events.append(event.kind))(
        _retrying(function)
    )

    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"functools\.wraps"):
            call("k")

    assert events == ["released", "released"]
