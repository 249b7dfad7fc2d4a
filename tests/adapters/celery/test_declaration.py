"""How a Celery task is declared and called, without a broker."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, Task

from idempotency.adapters.celery import idempotent_task
from idempotency.errors import ConfigurationError, InProgressError
from idempotency.stores.memory import MemoryStore


@pytest.fixture
def app() -> Celery:
    return Celery("shop", broker="memory://", set_as_current=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"acks_late": False}, "needs acks_late and reject_on_worker_lost"),
        ({"reject_on_worker_lost": False}, "needs acks_late and reject_on_worker_lost"),
    ],
)
def test_a_task_whose_message_a_killed_worker_would_lose_is_refused(
    app: Celery, options: dict[str, Any], words: str
) -> None:
    @app.task(shared=False, base=idempotent_task(MemoryStore()), **options)
    def bill(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match=words):
        app.finalize()


def test_the_settings_of_the_application_do_not_matter(app: Celery) -> None:
    app.conf.update(task_acks_late=False, task_reject_on_worker_lost=False)

    @app.task(shared=False, base=idempotent_task(MemoryStore()))
    def bill(order: str) -> None: ...

    assert (bill.acks_late, bill.reject_on_worker_lost) == (True, True)


def test_an_annotation_that_would_lose_messages_is_refused(app: Celery) -> None:
    app.conf.task_annotations = {"*": {"acks_late": False}}

    @app.task(shared=False, base=idempotent_task(MemoryStore()))
    def bill(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="acks_late"):
        app.finalize()


def test_a_pause_as_long_as_the_visibility_timeout_is_refused(app: Celery) -> None:
    app.conf.broker_transport_options = {"visibility_timeout": 5}

    @app.task(shared=False, base=idempotent_task(MemoryStore(), pause=5.0))
    def bill(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="visibility_timeout"):
        app.finalize()


def test_a_coroutine_function_is_refused(app: Celery) -> None:
    @app.task(shared=False, base=idempotent_task(MemoryStore()))
    async def bill(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="coroutine"):
        app.finalize()


def test_a_base_class_whose_call_would_be_left_out_is_refused(app: Celery) -> None:
    class Traced(Task):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    class Wrong(idempotent_task(MemoryStore()), Traced): ...  # type: ignore[misc]

    @app.task(shared=False, base=Wrong)
    def bill(order: str) -> None: ...

    with pytest.raises(ConfigurationError, match="name it first"):
        app.finalize()


def test_all_tasks_of_an_application() -> None:
    app = Celery("shop", broker="memory://", set_as_current=False, task_cls=idempotent_task(MemoryStore()))

    @app.task(shared=False)
    def bill(order: str) -> str:
        return order

    assert bill.acks_late is True
    assert bill.apply(("A-1",), task_id="one").get() == "A-1"
    assert bill.forget("one") is True
    assert bill.forget("one") is False


def test_called_directly_it_is_the_plain_function(app: Celery) -> None:
    runs: list[str] = []

    @app.task(shared=False, base=idempotent_task(MemoryStore(), key=lambda order: order))
    def bill(order: str) -> int:
        runs.append(order)
        # Itself as a function: another key could not be meant, and its own is running.
        return bill("B-1") if order == "A-1" else len(runs)

    assert bill("B-1") == 1
    assert bill.apply(("A-1",)).get() == 3
    assert runs == ["B-1", "A-1", "B-1"]


def test_an_eager_task_replays_and_raises(app: Celery) -> None:
    store, runs = MemoryStore(), []

    @app.task(shared=False, base=idempotent_task(store, key=lambda order: order))
    def bill(order: str) -> int:
        runs.append(order)
        if order == "A-2" and len(runs) < 3:
            raise LookupError(order)
        if order == "A-3":
            return int(bill.apply(("A-3",)).get())
        return len(runs)

    assert [bill.apply(("A-1",)).get() for _ in range(2)] == [1, 1]
    with pytest.raises(LookupError):
        bill.apply(("A-2",)).get()
    assert bill.apply(("A-2",)).get() == 3
    with pytest.raises(InProgressError):
        bill.apply(("A-3",)).get()
