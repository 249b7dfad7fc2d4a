"""Celery, on every broker that it supports, in threads.

    relay = PollingRelay(engine, CeleryPublisher(app, task="shop.tasks.on_order_placed"), outbox=outbox)

    @app.task(base=idempotent_task(store))
    def on_order_placed(order): ...

A message is a task whose id is the id of the message, and whose only argument is the payload, decoded from JSON; None
where there is none. ``self.request.headers`` has ``id``, ``eventType`` and the message's own headers. The queue is the
one of the application's routes. Celery stores no result: nobody waits for one.

RabbitMQ confirms a task by a publisher confirm, which the publisher turns on. With Redis it is confirmed when Redis has
answered, so it is in the memory of the primary; with SQS by the answer of SQS.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from amqp.exceptions import AMQPError
from celery import Celery

from idempotency._outbox.message import ID_HEADER, Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import Outcome, Publisher, Refused, RetryLater, Sent
from idempotency.outbox.publishers._brokers import CELERY
from idempotency.outbox.publishers._cloudevents import DEFAULT_SOURCE, Format, headers_for
from idempotency.outbox.publishers._shared import NOT_TRIED, InUse, SharedClientPublisher, not_in_time
from idempotency.outbox.publishers._topic import Topic, topic_of

OPTIONS = {"task": str, "delivery_timeout": float, "format": str, "source": str}
CLIENT_OPTIONS = frozenset[str]()

_CONNECTIONS = 8
"""RabbitMQ takes milliseconds to confirm a task, and a connection waits for each."""

_NO_ROUTE = 312
"""The reply of RabbitMQ for a message that no queue would take."""


class CeleryPublisher(SharedClientPublisher["_Sender"]):
    """Send messages as tasks.

    ``app``: the application. ``task``: the name of the task; in it ``{aggregate_type}`` and ``{type}`` are replaced; or
    a function of the message. ``delivery_timeout``: seconds after which a batch is given up, default 30. ``format``:
    default ``"plain"``; ``"cloudevents"`` adds the attributes of CloudEvents as headers ``ce_...``, with ``source``.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """

    limits = CELERY

    def __init__(
        self,
        app: Celery,
        *,
        task: Topic,
        delivery_timeout: float = 15.0,
        format: Format = "plain",
        source: str = DEFAULT_SOURCE,
    ) -> None:
        super().__init__(delivery_timeout)
        self._app = app
        self._task_of = topic_of(task)
        self._headers_of = headers_for(format, source, "ce_")
        # Celery merges them with its own, which they would replace.
        self._reserved = frozenset(app.amqp.as_task_v2("", "").headers) - {ID_HEADER}

    async def _send(self, used: InUse[_Sender], deadline: float, message: Message) -> Outcome:
        headers = self._headers_of(message)
        if (reason := self.limits.refusal(message) or self._refusal(headers)) is not None:
            return Refused(reason)
        try:
            argument = None if message.payload is None else json.loads(message.payload)
        except ValueError:
            return Refused("its payload is not JSON, of which the argument of a task is made")
        begun = False
        try:
            async with asyncio.timeout_at(deadline), used.client.free:
                begun = True
                return await used.client.send(self._task_of(message), message.id, argument, headers)
        except TimeoutError:
            # Threads still wait for the broker.
            used.failed = True
            return not_in_time(self.delivery_timeout) if begun else NOT_TRIED

    def _refusal(self, headers: Mapping[str, str]) -> str | None:
        taken = sorted(self._reserved & headers.keys())
        return f"it has the headers {', '.join(taken)}, which Celery has itself" if taken else None

    async def _open(self) -> _Sender:
        return _Sender(self._app, self.delivery_timeout)

    async def _close(self, sender: _Sender, /) -> None:
        sender.close()


class _Sender:
    """Threads that send tasks, and their connections."""

    def __init__(self, app: Celery, timeout: float) -> None:
        self.free = asyncio.Semaphore(_CONNECTIONS)
        self._app = app
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(_CONNECTIONS, "idempotency-celery")
        self._idle: list[Any] = []
        self._closed = False

    async def send(self, task: str, task_id: str, argument: Any, headers: Mapping[str, str]) -> Outcome:
        """Send a task."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._send, task, task_id, argument, headers)

    def close(self) -> None:
        """Close the connections; those in use are closed when their tasks are sent."""
        self._closed = True
        while self._idle:
            self._threads.submit(_disconnect, self._idle.pop())
        self._threads.shutdown(wait=False)

    def _send(self, task: str, task_id: str, argument: Any, headers: Mapping[str, str]) -> Outcome:
        producer = None
        try:
            producer = self._idle.pop() if self._idle else self._connect()
            self._app.send_task(
                task,
                args=[argument],
                task_id=task_id,
                headers=dict(headers),
                producer=producer,
                retry=False,
                mandatory=True,
                confirm_timeout=self._timeout,
                # Else this process would wait for the result of every task.
                ignore_result=True,
                add_to_parent=False,
                # Celery's own text has the payload in it, and is logged by workers.
                argsrepr="(...)",
            )
        except Exception as error:
            # The rest of an answer must not be taken for that of the next task.
            _disconnect(producer)
            if isinstance(error, AMQPError) and error.reply_code == _NO_ROUTE:
                return Refused("RabbitMQ has no queue for it")
            return RetryLater(type(error.__cause__ or error).__name__)
        if self._closed:
            _disconnect(producer)
        else:
            self._idle.append(producer)
        return Sent()

    def _connect(self) -> Any:
        connection = self._app.connection_for_write(transport_options={"confirm_publish": True})
        # Each host is tried once: the relay repeats, with its own pauses.
        connection.ensure_connection(max_retries=max(len(connection.alt) - 1, 0), interval_start=0, interval_step=0)
        return self._app.amqp.Producer(connection, auto_declare=False)


def _disconnect(producer: Any) -> None:
    if producer is not None:
        with suppress(Exception):
            producer.connection.release()


def from_url(url: str, options: Mapping[str, Any], /) -> Publisher:
    """Make a publisher with the options of a URL's query; the URL is that of the broker, after ``celery+``."""
    if not options.get("task"):
        raise ConfigurationError("a celery+ URL needs the name of the task: ?task=...")
    app = Celery("idempotency-relay", broker=url.partition("+")[2], set_as_current=False)
    return CeleryPublisher(app, **options)
