"""Celery: a base class for tasks, on RabbitMQ, Redis and every other broker that Celery knows.

    @app.task(base=idempotent_task(store, session=Session, max_attempts=5))
    def bill(order_id): ...

A base class, not a decorator: it stands outside of ``autoretry_for``, whose retries are no failures here, and it brings
the settings without which a killed worker loses its message, ``acks_late`` and ``reject_on_worker_lost``.

Key: the task's id, the same at every retry and redelivery, or what ``key=`` makes of the arguments. Consumer: the
task's name. The message is acknowledged after the commit. A duplicate of a task that is running is sent again with the
same id and number of retries, and then acknowledged; the result of the running one is left alone. So a task may last
longer than the ``visibility_timeout`` of Redis.

What the task raises is rolled back. ``self.retry()`` and ``autoretry_for`` are Celery's own, with its ``max_retries``;
what else is raised is tried again up to ``max_attempts`` times, as ``self.retry()`` does it. ``Ignore`` and ``Reject``
are passed on, also rolled back; ``self.replace()`` is refused. A task that fails for good is a failure in the result
backend. Its message is sent to ``dead_letter=`` if given; else rejected, so that a dead-letter exchange of RabbitMQ
gets it (Celery before 5.7 acknowledges it), while Redis drops it. A hard time limit is as
a killed worker: the task is run again, up to ``max_attempts`` times (Celery before 5.7 acknowledges it).

At a replay the task returns its recorded result, None where that could not be kept, and what follows it goes out again:
the next one of a chain with the same id, a ``link`` with a new one, for which that task needs a ``key=``. Called
directly, ``bill(7)`` is the plain function.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Unpack

from celery.app.task import Task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded, TaskPredicate
from celery.exceptions import Retry as TaskRetry
from celery.signals import worker_process_init

from idempotency._calls import is_async, takes_session
from idempotency.consumer import (
    ConsumerOptions,
    DeadLetter,
    Delivered,
    Done,
    Failed,
    Replayed,
    Retry,
    SyncConsumer,
)
from idempotency.errors import ConfigurationError
from idempotency.function import dress
from idempotency.operation import current
from idempotency.stores.base import Store, SyncStore

_SENT_AGAIN = "idempotency-sent-again"
_REASON = "idempotency-reason"


@dataclass(frozen=True, slots=True)
class _Given:
    """What a base class was made with."""

    store: Any
    key: Callable[..., str] | None
    consumer: str | None
    fingerprint: Callable[..., bytes | str] | None
    pause: float
    dead_letter: str | None
    options: ConsumerOptions


@dataclass(frozen=True, slots=True)
class _Passed:
    """A task ended by telling Celery something: a retry that is sent already, or that its message be dropped."""

    signal: TaskPredicate


def idempotent_task(
    store: Store | SyncStore,
    *,
    key: Callable[..., str] | None = None,
    consumer: str | None = None,
    fingerprint: Callable[..., bytes | str] | None = None,
    pause: float = 1.0,
    dead_letter: str | None = None,
    **options: Unpack[ConsumerOptions],
) -> Any:
    """Make a base class whose tasks take effect once: for ``@app.task(base=...)`` or ``Celery(task_cls=...)``.

    ``key`` and ``fingerprint`` are given the task's arguments: ``lambda order_id: f"bill:{order_id}"``. By default the
    key is the task's id, and nothing is compared. ``consumer``: a name that precedes the task's own in the record.
    ``pause``: seconds before a task that failed, or whose duplicate is running, is tried again. Default 1.
    ``dead_letter``: the queue that gets the message of a task that failed for good, with the header
    ``idempotency-reason``. A worker on that queue runs it again, after ``task.forget(key)`` where attempts are counted.
    The other options are :class:`~idempotency.consumer.ConsumerOptions`, with a ``sessionmaker`` for ``session``: its
    session is ``current().session``, and the keyword ``session`` where the task has that parameter.
    With ``max_attempts`` at None a failure is final, unless Celery retries it. ``"stop"`` shuts the worker down; the
    message goes back to its queue.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work, when the task is bound to its app: at
    the latest when the worker starts.
    """
    if pause <= 0:
        raise ConfigurationError(f"pause must be positive: {pause!r}")
    given = _Given(store, key, consumer, fingerprint, pause, dead_letter, options)
    worker_process_init.connect(lambda **_: _leave_connections(given), weak=False)
    # A failure whose message is kept elsewhere is acknowledged.
    return type("IdempotentTask", (_IdempotentTask,), {"_given": given, "acks_on_failure": dead_letter is not None})


def _leave_connections(given: _Given) -> None:
    """Leave to the parent process the connections that its fork has brought here."""
    if hasattr(given.store, "forked"):
        given.store.forked()
    bind = getattr(given.options.get("session"), "kw", {}).get("bind")
    if bind is not None:
        bind.dispose(close=False)


class _IdempotentTask(Task):  # type: ignore[misc]
    """A task that runs once under its key."""

    acks_late = True
    reject_on_worker_lost = True
    acks_on_timeout = False

    _given: _Given
    _consumer: SyncConsumer
    _takes_session: bool

    @classmethod
    def on_bound(cls, app: Any) -> None:
        super().on_bound(app)
        if cls.name is None:
            return
        given = cls._given
        _check(cls, app, given)
        session = given.options.get("session")
        cls._takes_session = session is not None and takes_session(cls.run)
        if cls._takes_session:
            bound = not isinstance(inspect.getattr_static(cls, "run"), staticmethod)
            cls.__header__ = app.type_checker(dress(lambda: None, cls.run, session), bound=bound)
        # With pydantic=True a model is a dict of plain JSON when it comes from run().
        returns = (lambda: None) if getattr(cls, "_dump_pydantic_arguments", None) else cls.run
        name = f"{given.consumer}:{cls.name}" if given.consumer else cls.name
        cls._consumer = SyncConsumer(given.store, name, returns, given.options)

    @classmethod
    def forget(cls, key: str) -> bool:
        """Forget that a task was run, so that it can be sent again; False when it was not, or is just now."""
        return cls._consumer.forget(key)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request, given = self.request, self._given
        # The second is Celery's own mark of a task that is in its body, and so calls itself as a function.
        if request.called_directly or request._protected:
            return super().__call__(*args, **kwargs)
        request._protected = 1
        try:
            key = request.id if given.key is None else given.key(*args, **kwargs)
            compared = None if given.fingerprint is None else given.fingerprint(*args, **kwargs)
            work = self._work(args, kwargs)
            if request.is_eager:
                return _value(self._consumer.call(key, work, compared))
            delivered = self._consumer.deliver(key, work, attempt=self._attempt(), compared=compared)
        except Exception as error:
            if request.is_eager:
                raise
            self._stop(error)
        return self._settle(delivered)

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """See Celery. What it raises when there were too many retries is remembered: it is final."""
        try:
            return super().retry(*args, **kwargs)
        except TaskPredicate:
            raise
        except Exception as error:
            if not self.request.called_directly:
                self.request.given_up = error
            raise

    def replace(self, sig: Any) -> NoReturn:
        """Refuse: Celery sends the replacement and drops the task, which is rolled back.

        Raises :class:`~idempotency.errors.ConfigurationError`.
        """
        error = ConfigurationError(
            f"{self.name} cannot replace itself, as it would be rolled back: return, and let a chain or a link go on "
            f"({self.name}.s(...) | {sig.task}.s()), or send the other task with a task_id of its own"
        )
        if not self.request.called_directly:
            self.request.given_up = error
        raise error

    def _work(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        def work(*opened: Any) -> Any:
            more = {"session": opened[0]} if self._takes_session else {}
            try:
                return self.run(*args, **{**kwargs, **more})
            except TaskPredicate as signal:
                operation = current()
                if operation is not None:
                    operation.release()
                return _Passed(signal)

        return work

    def _attempt(self) -> int | None:
        """Say whether this is a first delivery. A retry that Celery counts is one; what was sent again here is none."""
        request = self.request
        sent_again = (request.headers or {}).get(_SENT_AGAIN) == str(request.retries)
        return None if sent_again or (request.delivery_info or {}).get("redelivered") else 1

    def _settle(self, delivered: Delivered) -> Any:
        given, retries = self._given, self.request.retries
        match delivered:
            case Done(value) | Replayed(value):
                return _value(value)
            case Retry(after):
                self._send_again(min(after, given.pause), retries)
                raise Ignore("a duplicate of a running task, sent again")
            case Failed(error):
                final = given.options.get("max_attempts") is None or self.request.get("given_up") is error
                if final:
                    self._bury("failed", error)
                self._send_again(given.pause, retries + 1)
                raise TaskRetry(exc=error, when=given.pause) from error
            case DeadLetter(reason, error):
                self._bury(reason, error)

    def _send_again(self, countdown: float, retries: int) -> None:
        signature = self.signature_from_request(countdown=countdown, retries=retries)
        self._send(signature, {_SENT_AGAIN: str(retries)})

    def _bury(self, reason: str, error: Exception) -> NoReturn:
        """Fail for good, as Celery does; the message is where it can be sent again from."""
        if self._given.dead_letter is not None:
            # An expired one would not reach the queue.
            signature = self.signature_from_request(queue=self._given.dead_letter, expires=None)
            self._send(signature, {_REASON: reason})
        raise error

    def _send(self, signature: Any, headers: dict[str, str]) -> None:
        """Send the message of this task. The one in hand may be acknowledged when the broker has confirmed it."""
        signature.options["headers"] = {**(signature.options.get("headers") or {}), **headers}
        confirmed = {"confirm_publish": True}
        try:
            with self.app.connection_for_write(transport_options=confirmed) as connection:
                signature.apply_async(connection=connection, add_to_parent=False)
        except Exception as error:
            self._consumer.rules.unsettled(error)
            self._requeue(error)

    def _stop(self, error: Exception) -> NoReturn:
        with suppress(Exception):
            self.app.control.shutdown(destination=[self.request.hostname])
        self._requeue(error)

    def _requeue(self, error: Exception) -> NoReturn:
        # So that a message which only comes back does not keep the worker busy.
        # A soft time limit that ends only now must not make a failure of it, which is not delivered again.
        with suppress(SoftTimeLimitExceeded):
            time.sleep(self._given.pause)
        raise Reject(repr(error), requeue=True) from error


def _value(value: Any) -> Any:
    if isinstance(value, _Passed):
        raise value.signal
    return value


def _check(task: Any, app: Any, given: _Given) -> None:
    """Refuse what would lose messages."""
    if not task.acks_late or not (task.reject_on_worker_lost or getattr(task, "retry_on_worker_lost", None)):
        raise ConfigurationError(
            f"{task.name} needs acks_late and reject_on_worker_lost, which its base class sets: else the message of a "
            "task whose worker is killed is lost"
        )
    if is_async(task.run):
        raise ConfigurationError(f"{task.name} is a coroutine function, which Celery does not await")
    timeout = app.conf.broker_transport_options.get("visibility_timeout")
    if timeout is not None and timeout <= given.pause:
        raise ConfigurationError(f"pause ({given.pause:g} s) must be shorter than visibility_timeout ({timeout:g} s)")
    later = task.__mro__[task.__mro__.index(_IdempotentTask) + 1 : task.__mro__.index(Task)]
    if any("__call__" in vars(each) for each in later):
        raise ConfigurationError(f"{task.name} has a base class whose __call__ would not be called: name it first")
