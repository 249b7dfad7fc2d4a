"""Celery: a base class for tasks, on RabbitMQ, Redis and every other broker that Celery knows.

    @app.task(base=idempotent_task(store, session=Session, max_attempts=5))
    def bill(order_id): ...

A base class, not a decorator: it stands outside of ``autoretry_for``, whose retries are no failures here, and it brings
the settings without which a killed worker loses its message, ``acks_late`` and ``reject_on_worker_lost``.

Key: the task's id, the same at every retry and redelivery, or what ``key=`` makes of the arguments. Consumer: the
task's name, after ``consumer=`` if given. The message is acknowledged after the commit. A duplicate of a task that is
running is sent again with the same id and number of retries, and then acknowledged; the result of the running one is
left alone. So a task may last longer than the ``visibility_timeout`` of Redis.

What the task raises is rolled back. ``self.retry()`` and ``autoretry_for`` are Celery's own, with its ``max_retries``;
what else is raised is tried again up to ``max_attempts`` times, as ``self.retry()`` does it. ``Ignore`` and ``Reject``
are passed on, also rolled back; ``self.replace()`` is refused. A task that fails for good is a failure in the result
backend. Its message is sent to ``dead_letter=`` if given; else rejected, so that a dead-letter exchange of RabbitMQ
gets it (Celery before 5.7 acknowledges it), while Redis drops it.

What fails around the task has its message delivered again: a hook, the result backend, sending the retry or what
follows. The result backend may call the task failed until then. The replay sends what follows. A hard time limit is as
a killed worker: the task is run again, up to ``max_attempts`` times (Celery before 5.7 acknowledges it).

At a replay the task returns its recorded result, and what follows it goes out again: the next one of a chain with the
same id, a ``link`` with a new one, for which that task needs a ``key=``. Where the result could not be kept it is None;
if something that takes it follows, the message is a dead letter. Called directly, ``bill(7)`` is the plain function.
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
from celery.signals import worker_process_init, worker_process_shutdown
from celery.utils.imports import symbol_by_name

from idempotency._engine.background import drain_sync
from idempotency._engine.readers import Fingerprint, check_readers, compared_by
from idempotency._signature import signature_without_session, takes_session, wrap_like
from idempotency.adapters._body import arguments_as_bytes
from idempotency.adapters.celery._worker import (
    NEVER_ENCODED,
    StopWorker,
    Tracer,
    as_it_came,
    check,
    decided,
    guarded,
    hands_on,
    leave_connections,
    request_of,
)
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
from idempotency.errors import ConfigurationError, NotReplayableError
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
    fingerprint: Fingerprint
    pause: float
    dead_letter: str | None
    options: ConsumerOptions


@dataclass(frozen=True, slots=True)
class _Passed:
    """A task ended by telling Celery something: a retry that is sent already, or that its message be dropped."""

    signal: TaskPredicate


class _Unsent(Reject):  # type: ignore[misc]
    """The task told Celery to retry it, which could not be sent."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error, requeue=True)
        self.error = error


def idempotent_task(
    store: Store | SyncStore,
    *,
    key: Callable[..., str] | None = None,
    consumer: str | None = None,
    fingerprint: Fingerprint = "body",
    pause: float = 1.0,
    dead_letter: str | None = None,
    **options: Unpack[ConsumerOptions],
) -> Any:
    """Make a base class whose tasks take effect once: for ``@app.task(base=...)`` or ``Celery(task_cls=...)``.

    ``key`` and ``fingerprint`` are given the task's arguments: ``lambda order_id: f"bill:{order_id}"``. By default the
    key is the task's id, and of repeated messages the arguments are compared (``"body"``), as they were sent; None
    compares nothing. A ``self.retry()`` with other arguments is another message under the same id: where its first one
    is delivered again, that is a dead letter, unless ``fingerprint`` says otherwise. ``consumer``: a name that precedes
    the task's own in the record. ``pause``: seconds before a task that failed, or whose duplicate is running, is tried
    again. Default 1.
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
    check_readers(key, fingerprint)
    given = _Given(store, key, consumer, fingerprint, pause, dead_letter, options)
    worker_process_init.connect(lambda **_: leave_connections(store, options.get("session")), weak=False)
    # A child ends by os._exit, before which the interpreter waits for nothing.
    worker_process_shutdown.connect(_drain)
    # A failure whose message is kept elsewhere is acknowledged.
    return type("IdempotentTask", (_IdempotentTask,), {"_given": given, "acks_on_failure": dead_letter is not None})


def _drain(**_: Any) -> None:
    drain_sync()


class _IdempotentTask(Task):  # type: ignore[misc]
    """A task that runs once under its key."""

    acks_late = True
    reject_on_worker_lost = True
    acks_on_timeout = False

    _given: _Given
    _consumer: SyncConsumer
    _takes_session: bool
    _sent: inspect.Signature
    _tracer: Tracer | None = None

    @classmethod
    def on_bound(cls, app: Any) -> None:
        super().on_bound(app)
        if cls.name is None:
            return
        given = cls._given
        check(cls, app, _IdempotentTask, given.pause)
        session = given.options.get("session")
        cls._takes_session = session is not None and takes_session(cls.run)
        bound = not isinstance(inspect.getattr_static(cls, "run"), staticmethod)
        signature = signature_without_session(cls.run) if cls._takes_session else inspect.signature(cls.run)
        cls._sent = signature.replace(parameters=[*signature.parameters.values()][bound:])
        if cls._takes_session:
            cls.__header__ = app.type_checker(wrap_like(lambda: None, cls.run, session), bound=bound)
        # With pydantic=True a model is a dict of plain JSON when it comes from run().
        returns = (lambda: None) if getattr(cls, "_dump_pydantic_arguments", None) else cls.run
        name = f"{given.consumer}:{cls.name}" if given.consumer else cls.name
        cls._consumer = SyncConsumer(given.store, name, returns, given.options)
        cls.Request = request_of(symbol_by_name(cls.Request))

    @property
    def __trace__(self) -> Tracer | None:
        """What Celery runs the task with, and makes when the worker starts."""
        return self._tracer

    @__trace__.setter
    def __trace__(self, tracer: Tracer | None) -> None:
        self._tracer = None if tracer is None else guarded(tracer, self._outside)

    @classmethod
    def forget(cls, key: str) -> bool:
        """Forget that a task was run, so that it can be sent again; False when it was not, or is just now."""
        return cls._consumer.forget(key)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        # The second is Celery's own mark of a task that is in its body, and so calls itself as a function.
        if request.called_directly or request._protected:
            return super().__call__(*args, **kwargs)
        request._protected = 1
        if request.is_eager:
            key, compared = self._named(args, kwargs)
            value = self._consumer.call(key, self._work(args, kwargs), compared)
            if isinstance(value, _Passed):
                # Not decided(): it may run within a task whose message is in hand.
                raise value.signal
            return value
        return self._settle(self._deliver(args, kwargs))

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """See Celery. What it raises when there were too many retries is final; a retry that is not sent is none."""
        request = self.request
        if request.called_directly or request.is_eager:
            return super().retry(*args, **kwargs)
        try:
            with self._confirmed() as connection:
                return super().retry(*args, **{**as_it_came(request), "connection": connection, **kwargs})
        except TaskPredicate as signal:
            unsent = signal.reason if isinstance(signal, Reject) else None
            if not isinstance(unsent, Exception) or unsent is not signal.__context__:
                raise
            if isinstance(unsent, NEVER_ENCODED):
                self._give_up(unsent)
                raise unsent from None
            raise _Unsent(unsent) from unsent
        except Exception as error:
            self._give_up(error)
            raise

    def replace(self, sig: Any) -> NoReturn:
        """Refuse: Celery sends the replacement and drops the task, which is rolled back.

        Raises :class:`~idempotency.errors.ConfigurationError`.
        """
        error = ConfigurationError(
            f"{self.name} cannot replace itself, as it would be rolled back: return, and let a chain or a link go on "
            f"({self.name}.s(...) | {sig.task}.s()), or send the other task with a task_id of its own"
        )
        self._give_up(error)
        raise error

    def _give_up(self, error: Exception) -> None:
        if not self.request.called_directly:
            self.request.given_up = error

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bytes | str | None]:
        given = self._given
        key = self.request.id if given.key is None else given.key(*args, **kwargs)
        # What else is in a message is not the same at each delivery: retries, what follows, and the encoding.
        return key, compared_by(
            given.fingerprint, lambda: arguments_as_bytes(self._sent, args, kwargs), *args, **kwargs
        )

    def _deliver(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Delivered:
        try:
            try:
                key, compared = self._named(args, kwargs)
            except SoftTimeLimitExceeded:
                raise
            except Exception as error:
                return self._consumer.rules.refuse_unreadable(error)
            return self._consumer.deliver(key, self._work(args, kwargs), attempt=self._attempt(), compared=compared)
        except Exception as error:
            # It may have ended while it waited for another; its own failure is here only where "stop" is asked for.
            if isinstance(error, SoftTimeLimitExceeded) and error is not self.request.get("failed"):
                self._requeue(error)
            self._requeue(error, StopWorker)

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
            except SoftTimeLimitExceeded as error:
                self.request.failed = error
                raise

        return work

    def _attempt(self) -> int | None:
        """Say whether this is a first delivery. A retry that Celery counts is one; what was sent again here is none."""
        request = self.request
        sent_again = (request.headers or {}).get(_SENT_AGAIN) == str(request.retries)
        return None if sent_again or (request.delivery_info or {}).get("redelivered") else 1

    def _settle(self, delivered: Delivered) -> Any:
        given, retries = self._given, self.request.retries
        match delivered:
            case Done(_Passed(_Unsent(error=error))):
                self._consumer.rules.unsettled(error)
                self._requeue(error)
            case Replayed(kept=False) if hands_on(self.request):
                self._not_kept()
            case Done(value) | Replayed(value):
                return _value(value)
            case Retry(after):
                self._send_again(min(after, given.pause), retries)
                raise decided(Ignore("a duplicate of a running task, sent again"))
            case Failed(error):
                final = given.options.get("max_attempts") is None or self.request.get("given_up") is error
                if final:
                    self._bury("failed", error)
                self._send_again(given.pause, retries + 1)
                raise decided(TaskRetry(exc=error, when=given.pause)) from error
            case DeadLetter(reason, error):
                self._bury(reason, error)

    def _not_kept(self) -> NoReturn:
        """Refuse to give None to what follows this task."""
        error = NotReplayableError("the result, which what follows is given, was not kept")
        try:
            letter = self._consumer.rules.refuse(error, error.code)
        except NotReplayableError:
            self._requeue(error, StopWorker)
        self._bury(letter.reason, error)

    def _outside(self, error: Exception, request: Any) -> Exception:
        """Say what becomes of the message when something around this task has failed."""
        stack: Any = self.request_stack
        stack.push(request)
        try:
            # What follows is not encoded by a second try either.
            if isinstance(error, NEVER_ENCODED):
                self._bury("failed", error)
            self._consumer.rules.unsettled(error)
            self._requeue(error)
        except Exception as signal:
            return signal
        finally:
            stack.pop()

    def _send_again(self, countdown: float, retries: int) -> None:
        signature = self.signature_from_request(countdown=countdown, retries=retries)
        self._send(signature, {_SENT_AGAIN: str(retries)})

    def _bury(self, reason: str, error: Exception) -> NoReturn:
        """Fail for good, as Celery does; the message is where it can be sent again from."""
        if self._given.dead_letter is not None:
            # An expired one would not reach the queue.
            signature = self.signature_from_request(queue=self._given.dead_letter, expires=None)
            self._send(signature, {_REASON: reason}, final=error)
        raise decided(error)

    def _send(self, signature: Any, headers: dict[str, str], final: Exception | None = None) -> None:
        """Send the message of this task. The one in hand may be acknowledged when the broker has confirmed it."""
        signature.options["headers"] = {**(signature.options.get("headers") or {}), **headers}
        signature.options.update(as_it_came(self.request))
        try:
            with self._confirmed() as connection:
                signature.apply_async(connection=connection, add_to_parent=False)
        except Exception as error:
            if final is not None and isinstance(error, NEVER_ENCODED):
                # It would come back for ever; as it is, the broker may have a place for it.
                raise decided(Reject(repr(final), requeue=False)) from final
            self._consumer.rules.unsettled(error)
            self._requeue(error)

    def _confirmed(self) -> Any:
        return self.app.connection_for_write(transport_options={"confirm_publish": True})

    def _requeue(self, error: Exception, how: type[Reject] = Reject) -> NoReturn:
        # So that a message which only comes back does not keep the worker busy.
        # A soft time limit that ends only now must not make a failure of it, which is not delivered again.
        with suppress(SoftTimeLimitExceeded):
            time.sleep(self._given.pause)
        raise decided(how(repr(error), requeue=True)) from error


def _value(value: Any) -> Any:
    if isinstance(value, _Passed):
        raise decided(value.signal)
    return value
