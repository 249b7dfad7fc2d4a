"""One delivery of a dramatiq message: what it owes before it is acknowledged, and what follows from its result."""

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

_AGAIN = "idempotency_again"
_UNCOUNTED = "idempotency_uncounted"
_FOLLOWS = "after_process_message"


class DeadLetteredError(Exception):
    """The message is not handled again: it goes to the dead-letter queue. The cause says why."""


class NotPassedOnError(Exception):
    """The message was handled, but its result was not stored, or what follows was not enqueued: a retry does that."""


class _NotEnqueuedError(MiddlewareError, BrokerConnectionError):
    """The broker does not take a message that must be delivered again: dramatiq tries to settle it later."""


@dataclass(slots=True)
class Delivery:
    """One delivery to this worker thread.

    ``owed``: what is to be enqueued, ``after`` seconds, before it is acked. ``lost``: what kept its result from those
    who wait for it.
    """

    message: MessageProxy
    rules: Rules | None = None
    feeds: bool = False
    owed: Message[Any] | None = None
    after: float = 0.0
    lost: Exception | None = None

    @property
    def attempt(self) -> int | None:
        """Return 1 for a first delivery; Redis does not tell, nor do we after a retry, which is a new message."""
        options = self.message.options
        new = not options.get("retries") and not options.get(_AGAIN)
        return 1 if new and getattr(self.message, "redelivered", None) is False else None

    def settle(self, delivered: Delivered, pause: float) -> Any:
        """Return the result, or raise what makes dramatiq settle the message."""
        match delivered:
            case Done(result):
                return result
            case Replayed(result, kept):
                if not kept:
                    self._without_result()
                return result
            case Retry(after):
                self.after = min(after, pause)
                # This delivery has no result; the Results middleware would store None.
                self.message.options["store_results"] = False
                raise SkipMessage("the message is being handled by another worker")
            case Failed(error):
                raise error
            case DeadLetter(reason, error):
                self.owed = None
                raise DeadLetteredError(f"{reason}: {error!r}") from error

    def unsettled(self, error: Exception) -> None:
        """Tell the event hook that the message is delivered again."""
        if self.rules is not None:
            self.rules.unsettled(error)

    def _without_result(self) -> None:
        """Keep None, which nobody returned, from the result backend and from the next actor of a pipeline."""
        self.message.options["store_results"] = False
        if self.feeds and self.rules is not None:
            error = NotReplayableError("The result was not kept, so the rest of the pipeline cannot be given it.")
            self.settle(self.rules.refuse(error, error.code), 0)


_DELIVERY: ContextVar[Delivery | None] = ContextVar("idempotency_dramatiq_delivery", default=None)


def begin(actor_name: str, options: dict[str, Any], pause: float, rules: Rules) -> Delivery | None:
    """Find the delivery that this is the handling of; None for a call, which may be from inside another actor."""
    delivery = _DELIVERY.get()
    if delivery is None or delivery.rules is not None or delivery.message.actor_name != actor_name:
        return None
    # Until it is known to be done: whatever is raised, or interrupts the thread, must not end in an ack.
    delivery.owed = delivery.message.copy(options={_AGAIN: True})
    delivery.rules, delivery.after = rules, pause
    target = delivery.message.options.get("pipe_target")
    ignored = options.get("pipe_ignore") or (target or {}).get("options", {}).get("pipe_ignore")
    delivery.feeds = target is not None and not ignored
    return delivery


def prepare(broker: Broker) -> None:
    """Have a broker keep what its deliveries owe; ConfigurationError for one that would lose messages."""
    if not any(isinstance(each, Retries) for each in broker.middleware):
        raise ConfigurationError("the broker needs the middleware Retries: without it, a message that fails is lost")
    if getattr(broker, "confirm_delivery", True) is False:
        raise ConfigurationError(
            "RabbitmqBroker needs confirm_delivery=True: a message is acknowledged when its retry is enqueued, and "
            "would be lost if RabbitMQ never got that"
        )
    if not any(isinstance(each, _Redelivery) for each in broker.middleware):
        # After a message, the first middleware is the last: it sees what became of all that the others do.
        broker.add_middleware(_Redelivery(), before=type(broker.middleware[0]))


def _handled(message: MessageProxy) -> Delivery | None:
    """Find the delivery of a message that one of our actors handled."""
    delivery = _DELIVERY.get()
    return delivery if delivery is not None and delivery.message is message and delivery.rules is not None else None


class _Redelivery(Middleware):
    """Know the delivery of this thread, and enqueue what it owes before it is acknowledged."""

    def before_worker_boot(self, broker: Broker, worker: Any) -> None:
        for each in broker.middleware:
            if isinstance(getattr(each, _FOLLOWS), _Watched):
                continue
            if isinstance(each, GroupCallbacks):
                setattr(each, _FOLLOWS, _Counted(each))
            elif isinstance(each, Callbacks | Pipelines | Results):
                setattr(each, _FOLLOWS, _Watched(each))

    def before_worker_thread_shutdown(self, broker: Broker, thread: Any) -> None:
        # The event loop of asynchronous actors is stopped later, without waiting for its tasks.
        loop = get_event_loop_thread()
        if loop is not None:
            loop.run_coroutine(drain())

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        _DELIVERY.set(Delivery(message))

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        delivery = _handled(message)
        if delivery is None or exception is not None:
            return
        if delivery.lost is None:
            delivery.owed = None
            return
        delivery.owed = message.copy(options={_AGAIN: True})
        delivery.unsettled(delivery.lost)
        retries = next(each for each in broker.middleware if isinstance(each, Retries))
        try:
            raise NotPassedOnError(f"what follows from the message is retried: {delivery.lost!r}") from delivery.lost
        except NotPassedOnError as error:
            message.stuff_exception(error)
            retries.after_process_message(broker, message, exception=error)  # type: ignore[no-untyped-call]

    def after_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        delivery = _DELIVERY.get()
        if delivery is not None and delivery.message.message_id == message.message_id:
            delivery.owed = None

    def before_ack(self, broker: Broker, message: MessageProxy) -> None:
        delivery = _handled(message)
        if delivery is None or delivery.owed is None:
            return
        try:
            broker.enqueue(delivery.owed, delay=int(delivery.after * 1000))
        except Exception as error:
            delivery.unsettled(error)
            raise _NotEnqueuedError(f"the message was not enqueued again: {error!r}") from error  # type: ignore[no-untyped-call]


class _Watched:
    """What one middleware does after a message: dramatiq acknowledges it also where that fails."""

    def __init__(self, middleware: Any) -> None:
        self._middleware = middleware
        self._follow = middleware.after_process_message

    def __call__(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        delivery = _handled(message)
        if delivery is None or exception is not None:
            self._follow(broker, message, result=result, exception=exception)
            return
        try:
            self._pass_on(broker, message, result)
        except Exception as error:
            delivery.lost = error
            raise

    def _pass_on(self, broker: Broker, message: MessageProxy, result: Any) -> None:
        self._follow(broker, message, result=result)


class _Counted(_Watched):
    """The members of a group, each counted once: a duplicate would stand for a member that still runs."""

    def _pass_on(self, broker: Broker, message: MessageProxy, result: Any) -> None:
        group, again = message.options.get("group_completion_uuid"), message.options.get(_UNCOUNTED, False)
        if group is None:
            return
        mark, groups = f"{group}:{message.message_id}", self._middleware
        message.options[_UNCOUNTED] = True
        if groups.rate_limiter_backend.add(mark, 1, groups.barrier_ttl) or again:
            self._follow(broker, message, result=result)
        del message.options[_UNCOUNTED]
