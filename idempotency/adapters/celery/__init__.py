"""Celery: a base class for tasks, on RabbitMQ, Redis and every other broker that Celery supports.

    @app.task(base=idempotent_task(store, session=Session, max_attempts=5))
    def bill(order_id): ...

It is a base class and not a decorator for two reasons. It runs outside of ``autoretry_for``, whose retries are no
failures here. And it sets ``acks_late`` and ``reject_on_worker_lost``, without which the message of a killed worker is
lost.

Key: the task's id, the same at every retry and redelivery, or what ``key=`` makes of the arguments. Consumer: the
task's name, after ``consumer=`` if given. The message is acknowledged after the commit. A duplicate of a running task
is sent again with the same id and number of retries, and then acknowledged; the result of the running task is not
changed. So a task may take longer than the ``visibility_timeout`` of Redis.

An error of the task rolls its effect back. ``self.retry()`` and ``autoretry_for`` are Celery's own, with its
``max_retries``. After any other error the task is tried again up to ``max_attempts`` times, in the way of
``self.retry()``. ``Ignore`` and ``Reject`` are passed to Celery, and roll back too; ``self.replace()`` is refused. A
task that fails for good is a failure in the result backend. Its message is sent to ``dead_letter=`` if given. Else it
is rejected, so that a dead-letter exchange of RabbitMQ gets it (Celery before 5.7 acknowledges it); Redis drops it.

After a failure around the task (of a hook, of the result backend, or when the retry or a following task is sent) the
message is delivered again. Until then the task may be a failure in the result backend. The replay sends the following
tasks. A hard time limit has the effect of a killed worker: the task is run again, up to ``max_attempts`` times (Celery
before 5.7 acknowledges it).

At a replay the task returns its recorded result, and the following tasks are sent again: the next task of a chain with
the same id, a ``link`` with a new one, so that a linked task needs a ``key=``. A result that could not be recorded is
None at the replay; if a following task takes the result, the message is then a dead letter. A direct call, ``bill(7)``,
calls the plain function.
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
    ENCODING_ERRORS,
    StopWorker,
    Tracer,
    check,
    drop_inherited_connections,
    request_of,
    result_is_used,
    serializer_option,
    settled_by,
    with_failures_around,
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
class _Settings:
    """The arguments with which a base class was made."""

    store: Any
    key: Callable[..., str] | None
    consumer: str | None
    fingerprint: Fingerprint
    pause: float
    dead_letter: str | None
    options: ConsumerOptions


@dataclass(frozen=True, slots=True)
class _Passed:
    """The task ended with an error that is an instruction for Celery: a retry, which is sent already, or a drop."""

    signal: TaskPredicate


class _Unsent(Reject):  # type: ignore[misc]
    """The retry that the task asked for could not be sent."""

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
    key is the task's id, and the arguments of repeated messages are compared (``"body"``), as they were sent; None
    compares nothing. A ``self.retry()`` with other arguments is another message under the same id: where the first
    message is delivered again, it is a dead letter, unless ``fingerprint`` returns the same for both. ``consumer``: a
    name that precedes the task's own in the record. ``pause``: seconds before a task that failed, or whose duplicate is
    running, is tried again. Default 1.
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
    settings = _Settings(store, key, consumer, fingerprint, pause, dead_letter, options)
    worker_process_init.connect(lambda **_: drop_inherited_connections(store, options.get("session")), weak=False)
    # A child process ends by os._exit(), which does not wait for writes in the background.
    worker_process_shutdown.connect(_drain)
    # The message of a failed task is acknowledged where a copy of it is in the queue for dead letters.
    return type(
        "IdempotentTask", (_IdempotentTask,), {"_settings": settings, "acks_on_failure": dead_letter is not None}
    )


def _drain(**_: Any) -> None:
    drain_sync()


class _IdempotentTask(Task):  # type: ignore[misc]
    """A task that runs once under its key."""

    acks_late = True
    reject_on_worker_lost = True
    acks_on_timeout = False

    _settings: _Settings
    _consumer: SyncConsumer
    _takes_session: bool
    _sent: inspect.Signature
    _tracer: Tracer | None = None

    @classmethod
    def on_bound(cls, app: Any) -> None:
        super().on_bound(app)
        if cls.name is None:
            return
        settings = cls._settings
        check(cls, app, _IdempotentTask, settings.pause)
        session = settings.options.get("session")
        cls._takes_session = session is not None and takes_session(cls.run)
        bound = not isinstance(inspect.getattr_static(cls, "run"), staticmethod)
        signature = signature_without_session(cls.run) if cls._takes_session else inspect.signature(cls.run)
        cls._sent = signature.replace(parameters=[*signature.parameters.values()][bound:])
        if cls._takes_session:
            cls.__header__ = app.type_checker(wrap_like(lambda: None, cls.run, session), bound=bound)
        # With pydantic=True run() returns a dict of plain JSON where the annotation is a model.
        returns = (lambda: None) if getattr(cls, "_dump_pydantic_arguments", None) else cls.run
        name = f"{settings.consumer}:{cls.name}" if settings.consumer else cls.name
        cls._consumer = SyncConsumer(settings.store, name, returns, settings.options)
        cls.Request = request_of(symbol_by_name(cls.Request))

    @property
    def __trace__(self) -> Tracer | None:
        """The tracer, with which Celery runs the task; Celery sets it when the worker starts."""
        return self._tracer

    @__trace__.setter
    def __trace__(self, tracer: Tracer | None) -> None:
        self._tracer = None if tracer is None else with_failures_around(tracer, self._settle_failure_around)

    @classmethod
    def forget(cls, key: str) -> bool:
        """Forget that a task was run, so that it can be sent again; False where it was not run, or is running."""
        return cls._consumer.forget(key)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        # Celery sets _protected while the body of the task runs: then the task calls itself as a function.
        if request.called_directly or request._protected:
            return super().__call__(*args, **kwargs)
        request._protected = 1
        if request.is_eager:
            key, compared = self._key_and_compared(args, kwargs)
            value = self._consumer.call(key, self._work(args, kwargs), compared)
            if isinstance(value, _Passed):
                # Without settled_by(): the call may be inside another task, whose message it must not settle.
                raise value.signal
            return value
        return self._settle(self._deliver(args, kwargs))

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Retry the task, as Celery does.

        The error after too many retries is final. A retry that could not be sent is not: the message is redelivered.
        """
        request = self.request
        if request.called_directly or request.is_eager:
            return super().retry(*args, **kwargs)
        try:
            with self._confirmed() as connection:
                return super().retry(*args, **{**serializer_option(request), "connection": connection, **kwargs})
        except TaskPredicate as signal:
            unsent = signal.reason if isinstance(signal, Reject) else None
            if not isinstance(unsent, Exception) or unsent is not signal.__context__:
                raise
            if isinstance(unsent, ENCODING_ERRORS):
                self._give_up(unsent)
                raise unsent from None
            raise _Unsent(unsent) from unsent
        except Exception as error:
            self._give_up(error)
            raise

    def replace(self, sig: Any) -> NoReturn:
        """Refuse to replace the task: Celery would send the replacement and drop this task, which is then rolled back.

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

    def _key_and_compared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bytes | str | None]:
        settings = self._settings
        key = self.request.id if settings.key is None else settings.key(*args, **kwargs)
        # Other parts of a message are not the same at each delivery: retries, following tasks, and the encoding.
        return key, compared_by(
            settings.fingerprint, lambda: arguments_as_bytes(self._sent, args, kwargs), *args, **kwargs
        )

    def _deliver(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Delivered:
        try:
            try:
                key, compared = self._key_and_compared(args, kwargs)
            except SoftTimeLimitExceeded:
                raise
            except Exception as error:
                return self._consumer.rules.refuse_unreadable(error)
            return self._consumer.deliver(key, self._work(args, kwargs), attempt=self._attempt(), compared=compared)
        except Exception as error:
            # The time limit may end while the delivery waits for a duplicate. The task's own failure comes here only
            # by "stop".
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
        """Return 1 for a first delivery, else None.

        A retry that Celery counts is a first delivery of its own. A message that was sent again here is not.
        """
        request = self.request
        sent_again = (request.headers or {}).get(_SENT_AGAIN) == str(request.retries)
        return None if sent_again or (request.delivery_info or {}).get("redelivered") else 1

    def _settle(self, delivered: Delivered) -> Any:
        settings, retries = self._settings, self.request.retries
        match delivered:
            case Done(_Passed(_Unsent(error=error))):
                self._consumer.rules.unsettled(error)
                self._requeue(error)
            case Replayed(kept=False) if result_is_used(self.request):
                self._fail_without_result()
            case Done(value) | Replayed(value):
                return _value(value)
            case Retry(after):
                self._send_again(min(after, settings.pause), retries)
                raise settled_by(Ignore("a duplicate of a running task, sent again"))
            case Failed(error):
                final = settings.options.get("max_attempts") is None or self.request.get("given_up") is error
                if final:
                    self._fail_for_good("failed", error)
                self._send_again(settings.pause, retries + 1)
                raise settled_by(TaskRetry(exc=error, when=settings.pause)) from error
            case DeadLetter(reason, error):
                self._fail_for_good(reason, error)

    def _fail_without_result(self) -> NoReturn:
        """Refuse to give None to a following task."""
        error = NotReplayableError("the result was not recorded, and a following task takes it")
        try:
            letter = self._consumer.rules.refuse(error, error.code)
        except NotReplayableError:
            self._requeue(error, StopWorker)
        self._fail_for_good(letter.reason, error)

    def _settle_failure_around(self, error: Exception, request: Any) -> Exception:
        """Return the error that settles the message after something around this task has failed."""
        stack: Any = self.request_stack
        stack.push(request)
        try:
            # A second try could not encode the following task either.
            if isinstance(error, ENCODING_ERRORS):
                self._fail_for_good("failed", error)
            self._consumer.rules.unsettled(error)
            self._requeue(error)
        except Exception as signal:
            return signal
        finally:
            stack.pop()

    def _send_again(self, countdown: float, retries: int) -> None:
        signature = self.signature_from_request(countdown=countdown, retries=retries)
        self._send(signature, {_SENT_AGAIN: str(retries)})

    def _fail_for_good(self, reason: str, error: Exception) -> NoReturn:
        """Fail as Celery does, after a copy of the message was sent to the queue for dead letters, if there is one."""
        if self._settings.dead_letter is not None:
            # A message that has expired would not reach the queue.
            signature = self.signature_from_request(queue=self._settings.dead_letter, expires=None)
            self._send(signature, {_REASON: reason}, final=error)
        raise settled_by(error)

    def _send(self, signature: Any, headers: dict[str, str], final: Exception | None = None) -> None:
        """Send the message of this task again, and wait until the broker has confirmed it: then it may be acknowledged.

        ``final``: the error of a task that fails for good.
        """
        signature.options["headers"] = {**(signature.options.get("headers") or {}), **headers}
        signature.options.update(serializer_option(self.request))
        try:
            with self._confirmed() as connection:
                signature.apply_async(connection=connection, add_to_parent=False)
        except Exception as error:
            if final is not None and isinstance(error, ENCODING_ERRORS):
                # A requeued message would come back for ever. A rejected one goes to a dead-letter exchange, if any.
                raise settled_by(Reject(repr(final), requeue=False)) from final
            self._consumer.rules.unsettled(error)
            self._requeue(error)

    def _confirmed(self) -> Any:
        return self.app.connection_for_write(transport_options={"confirm_publish": True})

    def _requeue(self, error: Exception, how: type[Reject] = Reject) -> NoReturn:
        # Wait, so that a message which only comes back does not keep the worker busy. A soft time limit that ends now
        # must not make it a failure, which is not delivered again.
        with suppress(SoftTimeLimitExceeded):
            time.sleep(self._settings.pause)
        raise settled_by(how(repr(error), requeue=True)) from error


def _value(value: Any) -> Any:
    if isinstance(value, _Passed):
        raise settled_by(value.signal)
    return value
