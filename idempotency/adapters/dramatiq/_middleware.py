"""The middleware of dramatiq: what must be enqueued before a message is acknowledged, and what follows its result."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from dramatiq import Broker, Message
from dramatiq.asyncio import get_event_loop_thread
from dramatiq.broker import MessageProxy
from dramatiq.errors import BrokerConnectionError
from dramatiq.middleware import (
    Callbacks,
    GroupCallbacks,
    Middleware,
    MiddlewareError,
    Pipelines,
    Retries,
    SkipMessage,
)
from dramatiq.results import Results

from idempotency._engine.background import drain
from idempotency._messages.rules import Rules
from idempotency.consumer import DeadLetter, Delivered, Done, Failed, Replayed, Retry
from idempotency.errors import ConfigurationError, NotReplayableError

_ENQUEUED_AGAIN = "idempotency_again"
"""The option of a message that was enqueued again here."""

_NOT_COUNTED = "idempotency_uncounted"
"""The option of a member of a group that may not be counted yet."""

_FOLLOW_UP = "after_process_message"


class DeadLetteredError(Exception):
    """The message is not handled again: it goes to the dead-letter queue. The cause has the reason."""


class NotPassedOnError(Exception):
    """The message was handled, but its result not stored, or a following message not enqueued. A retry does that."""


class _NotEnqueuedError(MiddlewareError, BrokerConnectionError):
    """The broker does not accept a message that must be delivered again: dramatiq tries to settle it later."""


@dataclass(slots=True)
class WorkerMessage:
    """The message that this worker thread handles.

    ``rules``: of the actor that handles it; None until it begins. ``result_is_piped``: the next actor of a pipeline is
    given the result. ``to_enqueue``: the message to enqueue, with a delay of ``after`` seconds, before this one is
    acknowledged. ``follow_up_error``: why the result was not stored, or a following message was not enqueued.
    """

    message: MessageProxy
    rules: Rules | None = None
    result_is_piped: bool = False
    to_enqueue: Message[Any] | None = None
    after: float = 0.0
    follow_up_error: Exception | None = None

    @property
    def attempt(self) -> int | None:
        """Return 1 for a first delivery, else None. Redis does not mark redeliveries, and a retry is a new message."""
        options = self.message.options
        new = not options.get("retries") and not options.get(_ENQUEUED_AGAIN)
        return 1 if new and getattr(self.message, "redelivered", None) is False else None

    def settle(self, delivered: Delivered, pause: float) -> Any:
        """Return the result, or raise what makes dramatiq settle the message."""
        match delivered:
            case Done(result):
                return result
            case Replayed(result, recorded):
                if not recorded:
                    self._withhold_result()
                return result
            case Retry(after):
                self.after = min(after, pause)
                # Without a result here, the Results middleware would store None.
                self.message.options["store_results"] = False
                raise SkipMessage("the message is being handled by another worker")
            case Failed(error):
                raise error
            case DeadLetter(reason, error):
                self.to_enqueue = None
                raise DeadLetteredError(f"{reason}: {error!r}") from error

    def unsettled(self, error: Exception) -> None:
        """Emit the event of a message that could not be settled: it is delivered again."""
        if self.rules is not None:
            self.rules.unsettled(error)

    def _withhold_result(self) -> None:
        """Do not pass None, which the actor did not return, to the result backend or the next actor of a pipeline."""
        self.message.options["store_results"] = False
        if self.result_is_piped and self.rules is not None:
            error = NotReplayableError("The result was not recorded, so the rest of the pipeline cannot be given it.")
            self.settle(self.rules.refuse(error, error.code), 0)


_CURRENT: ContextVar[WorkerMessage | None] = ContextVar("idempotency_dramatiq_message", default=None)


def start_handling(actor_name: str, options: dict[str, Any], pause: float, rules: Rules) -> WorkerMessage | None:
    """Return the message that an actor begins to handle; None for a direct call, also from inside another actor."""
    current = _CURRENT.get()
    if current is None or current.rules is not None or current.message.actor_name != actor_name:
        return None
    # Set until the message is handled: an error, or an interrupt of the thread, must not end in an ack alone.
    current.to_enqueue = current.message.copy(options={_ENQUEUED_AGAIN: True})
    current.rules, current.after = rules, pause
    target = current.message.options.get("pipe_target")
    ignored = options.get("pipe_ignore") or (target or {}).get("options", {}).get("pipe_ignore")
    current.result_is_piped = target is not None and not ignored
    return current


def install_middleware(broker: Broker) -> None:
    """Add the middleware to a broker; ConfigurationError for a broker that would lose messages."""
    if not any(isinstance(each, Retries) for each in broker.middleware):
        raise ConfigurationError("the broker needs the middleware Retries: without it, a message that fails is lost")
    if getattr(broker, "confirm_delivery", True) is False:
        raise ConfigurationError(
            "RabbitmqBroker needs confirm_delivery=True: a message is acknowledged when its retry is enqueued, and "
            "would be lost if RabbitMQ never received the retry"
        )
    if not any(isinstance(each, _Redelivery) for each in broker.middleware):
        # The first middleware is called last after a message: then it is noted whether the others have failed.
        broker.add_middleware(_Redelivery(), before=type(broker.middleware[0]))


def _handled(message: MessageProxy) -> WorkerMessage | None:
    """Return the message of this thread if one of our actors has handled it."""
    current = _CURRENT.get()
    return current if current is not None and current.message is message and current.rules is not None else None


class _Redelivery(Middleware):
    """Note the message that each thread handles, and enqueue what must be enqueued before it is acknowledged."""

    def before_worker_boot(self, broker: Broker, worker: Any) -> None:
        for each in broker.middleware:
            if isinstance(getattr(each, _FOLLOW_UP), _FollowUp):
                continue
            if isinstance(each, GroupCallbacks):
                setattr(each, _FOLLOW_UP, _GroupFollowUp(each))
            elif isinstance(each, Callbacks | Pipelines | Results):
                setattr(each, _FOLLOW_UP, _FollowUp(each))

    def before_worker_thread_shutdown(self, broker: Broker, thread: Any) -> None:
        # The event loop of asynchronous actors is stopped later, and does not wait for its tasks.
        loop = get_event_loop_thread()
        if loop is not None:
            loop.run_coroutine(drain())

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        _CURRENT.set(WorkerMessage(message))

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        current = _handled(message)
        if current is None or exception is not None:
            return
        if current.follow_up_error is None:
            current.to_enqueue = None
            return
        current.to_enqueue = message.copy(options={_ENQUEUED_AGAIN: True})
        current.unsettled(current.follow_up_error)
        retries = next(each for each in broker.middleware if isinstance(each, Retries))
        try:
            raise NotPassedOnError(
                f"what follows the message is retried: {current.follow_up_error!r}"
            ) from current.follow_up_error
        except NotPassedOnError as error:
            message.stuff_exception(error)
            retries.after_process_message(broker, message, exception=error)  # type: ignore[no-untyped-call]

    def after_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        current = _CURRENT.get()
        if current is not None and current.message.message_id == message.message_id:
            current.to_enqueue = None

    def before_ack(self, broker: Broker, message: MessageProxy) -> None:
        current = _handled(message)
        if current is None or current.to_enqueue is None:
            return
        try:
            broker.enqueue(current.to_enqueue, delay=int(current.after * 1000))
        except Exception as error:
            current.unsettled(error)
            raise _NotEnqueuedError(f"the message was not enqueued again: {error!r}") from error  # type: ignore[no-untyped-call]


class _FollowUp:
    """What one middleware does after a message. dramatiq acknowledges the message also where that fails."""

    def __init__(self, middleware: Any) -> None:
        self._middleware = middleware
        self._follow_up = middleware.after_process_message

    def __call__(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        current = _handled(message)
        if current is None or exception is not None:
            self._follow_up(broker, message, result=result, exception=exception)
            return
        try:
            self._pass_on(broker, message, result)
        except Exception as error:
            current.follow_up_error = error
            raise

    def _pass_on(self, broker: Broker, message: MessageProxy, result: Any) -> None:
        self._follow_up(broker, message, result=result)


class _GroupFollowUp(_FollowUp):
    """The follow-up of a group, which counts its members, each once: a duplicate must not count for another member."""

    def _pass_on(self, broker: Broker, message: MessageProxy, result: Any) -> None:
        group, not_counted = message.options.get("group_completion_uuid"), message.options.get(_NOT_COUNTED, False)
        if group is None:
            return
        mark, groups = f"{group}:{message.message_id}", self._middleware
        message.options[_NOT_COUNTED] = True
        if groups.rate_limiter_backend.add(mark, 1, groups.barrier_ttl) or not_counted:
            self._follow_up(broker, message, result=result)
        del message.options[_NOT_COUNTED]
