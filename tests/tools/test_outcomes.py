"""How calls of a tool end: once, unknown until it is found out, or refused in words."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from idempotency import Policy, current, drain
from idempotency._rules import State
from idempotency.errors import (
    ConfigurationError,
    IdempotencyError,
    InProgressError,
    NotReplayableError,
    OutcomeUnknownError,
    StoreError,
)
from idempotency.events import Event
from idempotency.stores.memory import MemoryStore
from idempotency.testing import FaultyStore, ManualClock
from idempotency.tool import NOT_DONE, idempotent_tool, tool_call
from tests.kit.asgi_servers import until

everywhere = pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")

VERBS = ("claim", "renew", "complete", "release", "watch", "aclose")

FAILURES: list[Callable[[], Exception]] = [
    TimeoutError,
    ConnectionResetError,
    BrokenPipeError,
    EOFError,
    lambda: caused_by(TimeoutError()),
    lambda: ExceptionGroup("several", [ValueError(), ConnectionResetError()]),
]


def caused_by(cause: Exception) -> Exception:
    """Make the error of a client, as it hides the error of a socket."""
    error = RuntimeError("the provider failed")
    error.__cause__ = cause
    return error


class Provider:
    """A payment provider that a tool calls, and that a verification asks."""

    def __init__(self) -> None:
        self.refunds: list[str] = []
        self.failure: Exception | None = None
        self.failure_before: Exception | None = None
        self.asked = 0
        self.keys: list[str] = []

    def refund(self, order_id: str) -> str:
        if self.failure_before is not None:
            raise self.failure_before
        self.refunds.append(order_id)
        self.keys.append(derived())
        if self.failure is not None:
            raise self.failure
        return f"refund {order_id}"

    def find(self, order_id: str) -> Any:
        self.asked += 1
        self.keys.append(derived())
        return f"refund {order_id}" if order_id in self.refunds else NOT_DONE


def derived() -> str:
    operation = current()
    assert operation is not None
    return operation.derive("refund")


def make_tool(store: Any, provider: Provider, verified: bool = False, **options: Any) -> Any:
    async def verify(order_id: str) -> Any:
        return provider.find(order_id)

    @idempotent_tool(store, name="refund", intent=("order_id",), verify=verify if verified else None, **options)
    async def refund(order_id: str) -> str:
        return provider.refund(order_id)

    return refund


def make_tool_sync(store: Any, provider: Provider, verified: bool = False, **options: Any) -> Any:
    def verify(order_id: str) -> Any:
        return provider.find(order_id)

    @idempotent_tool(store, name="refund", intent=("order_id",), verify=verify if verified else None, **options)
    def refund(order_id: str) -> str:
        return provider.refund(order_id)

    return refund


@everywhere
async def test_a_replay_says_when_the_call_was_made(store: Any) -> None:
    refund = make_tool(store, Provider())

    with tool_call() as first:
        await refund("7")
    with tool_call() as again:
        assert await refund("7") == "refund 7"

    assert (first.replayed_at, first.note) == (None, "")
    assert again.replayed_at is not None
    assert timedelta() <= datetime.now(UTC) - again.replayed_at < timedelta(minutes=1)
    assert again.note.startswith("Nothing was done now: this is the recorded result of the same call, made at 20")


async def test_the_time_of_a_replay_is_that_of_the_first_call() -> None:
    clock = ManualClock()
    refund = make_tool(MemoryStore(clock=clock), Provider())
    await refund("7")
    clock.advance(3600)

    with tool_call() as again:
        await refund("7")

    assert again.replayed_at is not None
    age = datetime.now(UTC) - again.replayed_at
    assert timedelta(seconds=3600) <= age < timedelta(seconds=3660)


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_time_out_leaves_the_outcome_unknown(failure: Callable[[], Exception]) -> None:
    """So does a lost connection: the effect may have happened, and nothing runs again."""
    provider = Provider()
    provider.failure = failure()
    refund = make_tool(MemoryStore(), provider)

    for _ in range(3):
        with pytest.raises(OutcomeUnknownError):
            await refund("7")

    assert provider.refunds == ["7"]


async def test_a_time_out_of_an_http_client_leaves_the_outcome_unknown() -> None:
    """Its error is no TimeoutError, but has one as its cause."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        runs: list[str] = []

        @idempotent_tool(MemoryStore(), intent=("order_id",))
        async def refund(order_id: str) -> str:
            runs.append(order_id)
            async with httpx.AsyncClient() as client:
                await client.post(url, timeout=0.05)
            return "done"

        for _ in range(2):
            with pytest.raises(OutcomeUnknownError):
                await refund("7")

    assert runs == ["7"]


@pytest.mark.parametrize("failure", [ValueError("no such order"), ConnectionRefusedError()])
async def test_an_error_of_the_tool_lets_the_model_call_again(failure: Exception) -> None:
    """Nothing was done, so that the same call may be made again; a refused connection has carried nothing."""
    provider = Provider()
    provider.failure_before = failure
    refund = make_tool(MemoryStore(), provider)

    with pytest.raises(type(failure)):
        await refund("7")
    provider.failure_before = None

    assert await refund("7") == "refund 7"
    assert provider.refunds == ["7"]


async def test_what_the_policy_says_of_an_error_has_priority() -> None:
    provider = Provider()
    refund = make_tool(MemoryStore(), provider, policy=Policy(on_crash="hold", outcomes={TimeoutError: "release"}))
    provider.failure_before = TimeoutError()

    with pytest.raises(TimeoutError):
        await refund("7")
    provider.failure_before = None

    assert await refund("7") == "refund 7"


async def test_what_the_tool_declares_has_priority() -> None:
    runs: list[int] = []

    @idempotent_tool(MemoryStore(), intent=("order_id",))
    async def refund(order_id: str) -> str:
        runs.append(1)
        operation = current()
        assert operation is not None
        if len(runs) == 1:
            operation.release()
            raise TimeoutError
        operation.hold()
        raise ValueError

    with pytest.raises(TimeoutError):
        await refund("7")
    for _ in range(2):
        with pytest.raises(OutcomeUnknownError):
            await refund("7")

    assert runs == [1, 1]


async def test_a_tool_that_may_run_twice_is_not_held() -> None:
    provider = Provider()
    provider.failure = TimeoutError()
    refund = make_tool(MemoryStore(), provider, policy=Policy(on_crash="rerun"))

    for _ in range(2):
        with pytest.raises(TimeoutError):
            await refund("7")

    assert provider.refunds == ["7", "7"]


@everywhere
async def test_a_cancelled_call_is_unknown(store: Any) -> None:
    """A framework cancels a tool that takes too long, and the model tries again."""
    running, runs = asyncio.Event(), []

    @idempotent_tool(store, intent=("order_id",))
    async def refund(order_id: str) -> str:
        runs.append(order_id)
        running.set()
        await asyncio.Event().wait()
        return "done"

    call = asyncio.create_task(refund("7"))
    await running.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    with pytest.raises(OutcomeUnknownError):
        await refund("7")

    assert runs == ["7"]


@everywhere
async def test_an_unknown_effect_that_is_found_is_the_result(store: Any) -> None:
    """The call that timed out already gets it, and each later one."""
    provider = Provider()
    provider.failure = TimeoutError()
    refund = make_tool(store, provider, verified=True)

    assert await refund("7") == "refund 7"
    with tool_call() as again:
        assert await refund("7") == "refund 7"

    assert (provider.refunds, provider.asked) == (["7"], 1)
    assert again.replayed_at is not None


@pytest.mark.stores("memory", "redis", "sqlite", "postgres", "mariadb")
def test_an_unknown_effect_that_is_found_is_the_result_in_threads(sync_store: Any) -> None:
    provider = Provider()
    provider.failure = TimeoutError()
    refund = make_tool_sync(sync_store, provider, verified=True)

    assert refund("7") == refund("7") == "refund 7"
    assert (provider.refunds, provider.asked) == (["7"], 1)


@everywhere
async def test_an_effect_that_has_not_happened_may_happen_then(store: Any) -> None:
    """The call that timed out gets its error, and the next one runs the tool."""
    provider = Provider()
    provider.failure_before = TimeoutError()
    refund = make_tool(store, provider, verified=True)

    with pytest.raises(TimeoutError):
        await refund("7")
    provider.failure_before = None

    assert await refund("7") == "refund 7"
    assert provider.refunds == ["7"]


def test_an_effect_that_has_not_happened_may_happen_then_in_threads() -> None:
    provider = Provider()
    provider.failure_before = TimeoutError()
    refund = make_tool_sync(MemoryStore(), provider, verified=True)

    with pytest.raises(TimeoutError):
        refund("7")
    provider.failure_before = None

    assert refund("7") == "refund 7"
    assert provider.refunds == ["7"]


@pytest.mark.parametrize(("happened", "runs"), [(True, 1), (False, 2)])
async def test_a_crashed_call_is_verified_by_the_next(happened: bool, runs: int) -> None:
    """The owner vanished; while its lease lasts it is taken for running, and then its outcome is unknown."""
    clock = ManualClock()
    provider, attempts, running = Provider(), [], asyncio.Event()
    store = MemoryStore(clock=clock)

    async def verify(order_id: str) -> Any:
        return provider.find(order_id)

    @idempotent_tool(store, intent=("order_id",), verify=verify, policy=Policy(on_crash="hold", lease=30))
    async def refund(order_id: str) -> str:
        attempts.append(order_id)
        if len(attempts) == 1:
            if happened:
                provider.refund(order_id)
            running.set()
            await asyncio.Event().wait()
        return provider.refund(order_id)

    first = asyncio.create_task(refund("7"))
    await running.wait()
    with pytest.raises(InProgressError):
        await refund("7")
    clock.advance(31)

    assert await refund("7") == "refund 7"
    assert len(attempts) == runs
    assert provider.refunds == ["7"]
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_verification_has_the_keys_of_the_tool() -> None:
    """So that it finds at the provider what the tool did there."""
    provider = Provider()
    provider.failure = TimeoutError()

    await make_tool(MemoryStore(), provider, verified=True)("7")

    assert len(provider.keys) == 2
    assert len(set(provider.keys)) == 1


async def test_a_verification_that_fails_leaves_the_outcome_unknown() -> None:
    """And the next call verifies again."""
    events: list[Event] = []
    answers: list[Any] = [OSError("the provider is away"), "refund 7"]
    runs: list[str] = []

    async def verify(order_id: str) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @idempotent_tool(MemoryStore(), intent=("order_id",), verify=verify, on_event=events.append)
    async def refund(order_id: str) -> str:
        runs.append(order_id)
        raise TimeoutError

    with pytest.raises(OutcomeUnknownError) as unknown:
        await refund("7")
    assert isinstance(unknown.value.__cause__, OSError)
    assert [event.kind for event in events] == ["held", "unknown"]
    assert await refund("7") == "refund 7"
    assert runs == ["7"]


async def test_a_verification_that_returns_no_result_leaves_the_outcome_unknown() -> None:
    """None for an effect that was not found is a mistake, which must neither run the tool nor pass for its result."""
    runs: list[str] = []

    async def verify(order_id: str) -> Any:
        return None

    @idempotent_tool(MemoryStore(), intent=("order_id",), verify=verify)
    async def refund(order_id: str) -> str:
        runs.append(order_id)
        raise TimeoutError

    for _ in range(2):
        with pytest.raises(OutcomeUnknownError) as unknown:
            await refund("7")
        assert "return NOT_DONE" in str(unknown.value.__cause__)

    assert runs == ["7"]


async def test_one_verification_runs_at_a_time() -> None:
    """Else the slower one would free a call that ran again meanwhile."""
    clock, started, finish = ManualClock(), asyncio.Event(), asyncio.Event()
    runs: list[str] = []

    async def verify(order_id: str) -> Any:
        started.set()
        await finish.wait()
        return NOT_DONE

    @idempotent_tool(MemoryStore(clock=clock), intent=("order_id",), verify=verify)
    async def refund(order_id: str) -> str:
        runs.append(order_id)
        if len(runs) == 1:
            raise TimeoutError
        return "done"

    first = asyncio.create_task(refund("7"))
    await started.wait()
    with pytest.raises(InProgressError):
        await refund("7")
    finish.set()
    with pytest.raises(TimeoutError):
        await first

    assert await refund("7") == "done"
    assert runs == ["7", "7"]


async def test_a_verification_that_lost_its_lease_changes_nothing() -> None:
    """Another one may have freed the call meanwhile, and it may have run again."""
    store = FaultyStore().order("renew", "refuse", "refuse")
    runs: list[str] = []
    answers: list[Any] = [NOT_DONE, "done"]

    async def verify(order_id: str) -> Any:
        if len(answers) == 2:
            await until(lambda: "renew" in store.calls, "the renewal of its lease")
            for _ in range(5):
                await asyncio.sleep(0)  # its task reads the answer
        return answers.pop(0)

    @idempotent_tool(store, intent=("order_id",), verify=verify, policy=Policy(on_crash="hold", lease=0.3))
    async def refund(order_id: str) -> str:
        runs.append(order_id)
        raise TimeoutError

    with pytest.raises(OutcomeUnknownError) as unknown:
        await refund("7")

    assert str(unknown.value.__cause__) == "Another verification of the call began before this one ended."
    assert await refund("7") == "done"
    assert runs == ["7"]


async def test_a_verification_that_was_overtaken_frees_nothing() -> None:
    """Its process was paused for longer than its lease. Another one freed the call meanwhile, which has run again."""
    clock, started, finish = ManualClock(), asyncio.Event(), asyncio.Event()
    runs: list[str] = []
    verifications: list[str] = []

    async def verify(order_id: str) -> Any:
        verifications.append(order_id)
        if len(verifications) == 1:
            started.set()
            await finish.wait()
        return NOT_DONE

    policy = Policy(on_crash="hold", lease=30)

    store = MemoryStore(clock=clock)

    @idempotent_tool(store, intent=("order_id",), verify=verify, policy=policy)
    async def refund(order_id: str) -> str:
        runs.append(order_id)
        raise TimeoutError

    paused = asyncio.create_task(refund("7"))
    await started.wait()
    clock.advance(31)
    with pytest.raises(OutcomeUnknownError):
        await refund("7")  # the verification frees it, it runs, and its outcome is unknown
    finish.set()

    with pytest.raises(OutcomeUnknownError):
        await paused
    assert runs == ["7", "7"]
    assert [entry.state for entry in await store.unresolved()] == [State.UNKNOWN]


def test_a_verification_that_was_overtaken_frees_nothing_in_threads() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    runs: list[str] = []
    verifications: list[str] = []

    def verify(order_id: str) -> Any:
        verifications.append(order_id)
        if len(verifications) == 1:
            clock.advance(31)
            other = threading.Thread(target=call_again)
            other.start()
            other.join()
        return NOT_DONE

    def call_again() -> None:
        with pytest.raises(OutcomeUnknownError):
            refund("7")

    policy = Policy(on_crash="hold", lease=30)

    @idempotent_tool(store, intent=("order_id",), verify=verify, policy=policy)
    def refund(order_id: str) -> str:
        runs.append(order_id)
        raise TimeoutError

    call_again()

    assert runs == ["7", "7"]
    assert [entry.state for entry in asyncio.run(store.unresolved())] == [State.UNKNOWN]


async def test_a_verification_of_other_arguments_is_refused() -> None:
    async def verify(order: str) -> Any: ...

    with pytest.raises(ConfigurationError, match="verify= must take the arguments of the tool"):

        @idempotent_tool(MemoryStore(), intent=("order_id",), verify=verify)
        async def refund(order_id: str) -> str:
            return "done"


async def test_a_result_that_is_too_large_is_found_but_not_recorded() -> None:
    async def verify(order_id: str) -> Any:
        return "x" * 100

    @idempotent_tool(
        MemoryStore(), intent=("order_id",), verify=verify, policy=Policy(on_crash="hold", max_response=50)
    )
    async def refund(order_id: str) -> str:
        raise TimeoutError

    with pytest.raises(NotReplayableError):
        await refund("7")


async def test_an_unknown_outcome_is_an_event() -> None:
    events: list[Event] = []
    provider = Provider()
    provider.failure = TimeoutError()
    refund = make_tool(MemoryStore(), provider, on_event=events.append)

    for _ in range(2):
        with pytest.raises(OutcomeUnknownError):
            await refund("7")

    assert [event.kind for event in events] == ["held", "unknown"]


async def test_a_store_that_is_away_runs_nothing() -> None:
    provider = Provider()
    refund = make_tool(FaultyStore().order("claim", "fail"), provider)

    with pytest.raises(StoreError):
        await refund("7")
    assert await refund("7") == "refund 7"

    assert provider.refunds == ["7"]


async def test_a_tool_may_run_unprotected_where_that_is_wanted() -> None:
    @idempotent_tool(FaultyStore().order("claim", "fail"), policy=Policy(on_store_error="fail_open"))
    async def act() -> str:
        assert current() is None
        return "done"

    with tool_call(caller_key="k") as call:
        assert await act() == "done"
    assert call.replayed_at is None


async def test_an_interim_result_is_not_recorded() -> None:
    """A tool that asks for more input has no outcome yet: the next round goes on under the same identity."""
    rounds: list[int] = []

    @idempotent_tool(MemoryStore(), intent=("order_id",))
    async def refund(order_id: str) -> str:
        rounds.append(1)
        return "which account?" if len(rounds) == 1 else "refunded"

    found = []
    for _ in range(3):
        with tool_call(is_interim=lambda value: value == "which account?") as call:
            found.append((await refund("7"), call.replayed_at is None))

    assert found == [("which account?", True), ("refunded", True), ("refunded", False)]
    assert rounds == [1, 1]


async def test_an_interim_result_after_the_effect_is_recorded() -> None:
    """The tool has declared that its effect has happened, so that it is not run again."""
    rounds: list[int] = []

    @idempotent_tool(MemoryStore(), intent=("order_id",))
    async def refund(order_id: str) -> str:
        rounds.append(1)
        operation = current()
        assert operation is not None
        operation.hold()
        return "failed"

    for _ in range(2):
        with tool_call(is_interim=lambda value: True):
            assert await refund("7") == "failed"

    assert rounds == [1]


async def test_a_store_that_fails_in_a_verification_leaves_the_outcome_unknown() -> None:
    """And the next call verifies again."""
    provider = Provider()
    store = FaultyStore()

    async def verify(order_id: str) -> Any:
        store.down = provider.asked == 0
        return provider.find(order_id)

    @idempotent_tool(store, intent=("order_id",), verify=verify, policy=Policy(on_crash="hold", lease=1))
    async def refund(order_id: str) -> str:
        provider.failure = TimeoutError()
        return provider.refund(order_id)

    with pytest.raises(OutcomeUnknownError):
        await refund("7")
    store.down = False
    await drain()

    assert await refund("7") == "refund 7"
    assert provider.refunds == ["7"]


async def test_a_store_that_cannot_resolve_is_refused() -> None:
    class Own:
        """A store of somebody's own, which has the verbs only."""

        claim, renew, complete, release, watch, aclose = (getattr(MemoryStore, name) for name in VERBS)

    async def verify(order_id: str) -> Any: ...

    own: Any = Own()
    with pytest.raises(ConfigurationError, match="verify= needs the capability Resolving, which Own does not have"):

        @idempotent_tool(own, intent=("order_id",), verify=verify)
        async def refund(order_id: str) -> str:
            return "done"


def test_a_thread_that_the_framework_gave_up_records_its_result() -> None:
    """A framework cannot cancel a thread: the tool ends, and the repeat gets the result."""
    started, finish = threading.Event(), threading.Event()
    effects: list[str] = []

    @idempotent_tool(MemoryStore(), intent=("order_id",))
    def refund(order_id: str) -> str:
        started.set()
        assert finish.wait(20)
        effects.append(order_id)
        return "done"

    thread = threading.Thread(target=refund, args=("7",))
    thread.start()
    assert started.wait(20)
    with pytest.raises(IdempotencyError):
        refund("7")
    finish.set()
    thread.join()

    assert refund("7") == "done"
    assert effects == ["7"]
