"""What stands around a Celery task: its tracer, where it runs, and its request, in the worker.

Celery acknowledges or drops the message of whatever fails. What fails around a task, before it or after its commit,
is no failure of the task: the next one of its chain could not be sent, the result backend is away, a hook raised. Its
message is delivered again, so that the task is run, or the replay sends what follows.

Beside that, what is done for a task before it runs.
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

NEVER_ENCODED = (EncodeError, SerializerNotInstalled)
"""What no second try helps."""

_CONTENT_TYPE = "content_type"
_decided: ContextVar[Exception | None] = ContextVar("idempotency_decided", default=None)

Signal = TypeVar("Signal", bound=Exception)
Tracer = Callable[[str, Any, Any, dict[str, Any]], tuple[Any, Any, Any, Any]]


class StopWorker(Reject):  # type: ignore[misc]
    """Put the message back into its queue, and shut the worker down."""


def decided(signal: Signal) -> Signal:
    """Note what a task is about to raise: it says what becomes of the message, whatever else fails from now on."""
    _decided.set(signal)
    return signal


def guarded(tracer: Tracer, outside: Callable[[Exception, Context], Exception]) -> Tracer:
    """Make a tracer that asks ``outside`` what becomes of a message when something around its task has failed.

    It raises nothing: what a tracer raises ends a worker without processes of its own, or is lost in a thread.
    """

    def trace(uuid: str, args: Any, kwargs: Any, request: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
        _decided.set(None)
        # Celery before 5.7 takes the next one off the list that it is given.
        given = {**request, "chain": [*request["chain"]]} if request.get("chain") else request
        try:
            traced = tracer(uuid, args, kwargs, given)
        except MemoryError:
            raise
        except Exception as raised:
            error = raised
        else:
            info = traced[1]
            if info is None or info.state != FAILURE or info.retval is _decided.get():
                return traced
            error = info.retval
        if (signal := _decided.get()) is not None:
            return _answer(signal)
        if isinstance(error, TaskPredicate):
            return _answer(error)
        return _answer(outside(error, Context(request, args=args, kwargs=kwargs, called_directly=False)))

    return trace


def _answer(signal: Exception) -> tuple[Any, Any, Any, Any]:
    """Say what a tracer does when a task has raised this."""
    try:
        raise get_pickleable_exception(signal)
    except Exception:
        return ExceptionInfo(internal=True), True, 0.0, None


def request_of(base: Any) -> Any:
    """Make the class of a task's requests: it hears in the worker that the worker is to stop, in every pool.

    A command would have to come over the broker, where remote control may be switched off.
    """
    if issubclass(base, _Request):
        return base
    return type("Request", (_Request, base), {})


class _Request:
    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)  # type: ignore[call-arg]
        request: dict[str, Any] = self.request_dict  # type: ignore[attr-defined]
        # Redis, unlike RabbitMQ, has it elsewhere.
        request["properties"] = {**request["properties"], _CONTENT_TYPE: message.content_type}

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        answer = super().on_failure(exc_info, *args, **kwargs)  # type: ignore[misc]
        error = exc_info.exception
        if isinstance(error.exc if isinstance(error, ExceptionWithTraceback) else error, StopWorker):
            state.should_stop = os.EX_OK
        return answer


def as_it_came(request: Context) -> dict[str, Any]:
    """Say how the message of a task is encoded, so that it can be sent again."""
    name = registry.type_to_name.get((request.properties or {}).get(_CONTENT_TYPE))
    return {} if name is None else {"serializer": name}


def hands_on(request: Context) -> bool:
    """Say whether something is given the result of this task."""
    following = [*(request.callbacks or ()), *(request.chain or ())[-1:], *filter(None, [request.chord])]
    return any(not each.get("immutable") for each in following)


def leave_connections(store: object, session: Any) -> None:
    """Leave to the parent process the connections that its fork has brought here."""
    if supports(store, Forkable):
        store.forked()
    bind = getattr(session, "kw", {}).get("bind")
    if bind is not None:
        bind.dispose(close=False)


def check(task: Any, app: Any, base: type, pause: float) -> None:
    """Refuse what would lose messages of a task of this base."""
    if not task.acks_late or not (task.reject_on_worker_lost or getattr(task, "retry_on_worker_lost", None)):
        raise ConfigurationError(
            f"{task.name} needs acks_late and reject_on_worker_lost, which its base class sets: else the message of a "
            "task whose worker is killed is lost"
        )
    if is_async(task.run):
        raise ConfigurationError(f"{task.name} is a coroutine function, which Celery does not await")
    timeout = app.conf.broker_transport_options.get("visibility_timeout")
    if timeout is not None and timeout <= pause:
        raise ConfigurationError(f"pause ({pause:g} s) must be shorter than visibility_timeout ({timeout:g} s)")
    later = task.__mro__[task.__mro__.index(base) + 1 : task.__mro__.index(Task)]
    if any("__call__" in vars(each) for each in later):
        raise ConfigurationError(f"{task.name} has a base class whose __call__ would not be called: name it first")
