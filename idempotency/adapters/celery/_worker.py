"""Parts of a Celery worker around a task: the tracer that runs it, its request, and checks before it runs.

Celery acknowledges or drops the message of a task that fails. But a failure around the task, before it or after its
commit, is no failure of the task: the next task of its chain could not be sent, the result backend cannot be reached, a
hook raised. Then the message is delivered again, so that the task is run, or the replay sends the tasks that follow.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback  # type: ignore[import-untyped]
from celery.app.task import Context, Task
from celery.exceptions import Reject, TaskPredicate
from celery.states import FAILURE
from celery.utils.serialization import get_pickleable_exception
from celery.worker import state
from kombu.exceptions import EncodeError, SerializerNotInstalled
from kombu.serialization import registry

from idempotency._signature import is_async
from idempotency.errors import ConfigurationError
from idempotency.stores.base import Forkable, supports

ENCODING_ERRORS = (EncodeError, SerializerNotInstalled)
"""A message that raises one of these can never be encoded: it is not tried again."""

_CONTENT_TYPE = "content_type"
_settlement: ContextVar[Exception | None] = ContextVar("idempotency_celery_settlement", default=None)
"""The error by which a task settles its message."""

Signal = TypeVar("Signal", bound=Exception)
Tracer = Callable[[str, Any, Any, dict[str, Any]], tuple[Any, Any, Any, Any]]


class StopWorker(Reject):  # type: ignore[misc]
    """Put the message back into its queue, and shut the worker down."""


def settled_by(signal: Signal) -> Signal:
    """Return the error that the task raises to settle its message, and note it: a later failure changes nothing."""
    _settlement.set(signal)
    return signal


def with_failures_around(tracer: Tracer, settle: Callable[[Exception, Context], Exception]) -> Tracer:
    """Return a tracer that settles the message also where something around its task fails.

    ``settle`` is given the failure and the request, and returns the error that settles the message. The tracer itself
    raises nothing: an error of a tracer ends a worker that has no child processes, and is lost in a thread.
    """

    def trace(uuid: str, args: Any, kwargs: Any, request: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
        _settlement.set(None)
        # Celery before 5.7 removes the next task from the list that it is given.
        given = {**request, "chain": [*request["chain"]]} if request.get("chain") else request
        try:
            traced = tracer(uuid, args, kwargs, given)
        except MemoryError:
            raise
        except Exception as raised:
            error = raised
        else:
            info = traced[1]
            if info is None or info.state != FAILURE or info.retval is _settlement.get():
                return traced
            error = info.retval
        if (signal := _settlement.get()) is not None:
            return _traced(signal)
        if isinstance(error, TaskPredicate):
            return _traced(error)
        return _traced(settle(error, Context(request, args=args, kwargs=kwargs, called_directly=False)))

    return trace


def _traced(signal: Exception) -> tuple[Any, Any, Any, Any]:
    """Return what a tracer returns when a task raises ``signal``."""
    try:
        raise get_pickleable_exception(signal)
    except Exception:
        return ExceptionInfo(internal=True), True, 0.0, None


def request_of(base: Any) -> Any:
    """Return the class of a task's requests, which runs in the worker's main process and can stop the worker.

    This works in every pool. A command would have to go through the broker, and remote control may be switched off.
    """
    if issubclass(base, _Request):
        return base
    return type("Request", (_Request, base), {})


class _Request:
    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)  # type: ignore[call-arg]
        request: dict[str, Any] = self.request_dict  # type: ignore[attr-defined]
        # With RabbitMQ the content type is among the properties, with Redis it is not.
        request["properties"] = {**request["properties"], _CONTENT_TYPE: message.content_type}

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        answer = super().on_failure(exc_info, *args, **kwargs)  # type: ignore[misc]
        error = exc_info.exception
        if isinstance(error.exc if isinstance(error, ExceptionWithTraceback) else error, StopWorker):
            state.should_stop = os.EX_OK
        return answer


def serializer_option(request: Context) -> dict[str, Any]:
    """Return the option by which the message of a task is encoded as it was, when it is sent again."""
    name = registry.type_to_name.get((request.properties or {}).get(_CONTENT_TYPE))
    return {} if name is None else {"serializer": name}


def result_is_used(request: Context) -> bool:
    """Return whether a following task is given the result of this task."""
    following = [*(request.callbacks or ()), *(request.chain or ())[-1:], *filter(None, [request.chord])]
    return any(not each.get("immutable") for each in following)


def drop_inherited_connections(store: object, session: Any) -> None:
    """Drop the connections that a fork has copied from the parent process, without closing them for the parent."""
    if supports(store, Forkable):
        store.forked()
    bind = getattr(session, "kw", {}).get("bind")
    if bind is not None:
        bind.dispose(close=False)


def check(task: Any, app: Any, base: type, pause: float) -> None:
    """Refuse settings with which messages of a task of this base would be lost."""
    if not task.acks_late or not (task.reject_on_worker_lost or getattr(task, "retry_on_worker_lost", None)):
        raise ConfigurationError(
            f"{task.name} needs acks_late and reject_on_worker_lost, which its base class sets: without them the "
            "message of a task whose worker is killed is lost"
        )
    if is_async(task.run):
        raise ConfigurationError(f"{task.name} is a coroutine function, which Celery does not await")
    timeout = app.conf.broker_transport_options.get("visibility_timeout")
    if timeout is not None and timeout <= pause:
        raise ConfigurationError(f"pause ({pause:g} s) must be shorter than visibility_timeout ({timeout:g} s)")
    later = task.__mro__[task.__mro__.index(base) + 1 : task.__mro__.index(Task)]
    if any("__call__" in vars(each) for each in later):
        raise ConfigurationError(f"{task.name} has a base class whose __call__ would not be called: name it first")
