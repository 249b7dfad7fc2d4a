"""Amazon SQS through boto3; behind AWS Lambda: :mod:`idempotency.adapters.aws_lambda`.

    @idempotent_consumer(store, consumer="billing", session=Session, max_attempts=5)
    def on_order(message, session): ...

    consume(boto3.client("sqs"), queue_url, on_order, dead_letter=dead_letter_url)

Key: the message attribute ``Idempotency-Key`` or ``id``, else the deduplication id that the producer gave a FIFO queue,
else the message id; see :func:`message_key`. A message id identifies one send: its redeliveries are caught, but an
order that was sent twice is two messages. ``key=`` of the decorator wins. Behind SNS without raw delivery, ``key=`` is
needed: there the attributes are inside of the body.
The message is deleted after the commit.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

from idempotency._brokers.sqs import message_key, send_dead_letter
from idempotency._engine.background import drain_sync
from idempotency.adapters._body import as_bytes
from idempotency.adapters._delivery import handle_sync, require_handler, warn_if_ttl_is_short
from idempotency.consumer import DeadLetter, Delivered, Done, Failed, Replayed, Retry, SyncHandler
from idempotency.errors import ConfigurationError

__all__ = ["consume", "message_key"]

_LONGEST_INVISIBLE = 43200
"""Seconds for which SQS hides a message at most."""

_MOST_RECEIVED = 10
_POLL_PAUSE = 1.0
"""Seconds between a poll that failed and the next."""


def consume(
    client: Any,
    queue_url: str,
    handler: SyncHandler[Any, Any],
    *,
    concurrency: int = 10,
    pause: float = 1.0,
    poll: int = 5,
    dead_letter: str | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Handle the messages of a queue until ``stop`` is set or a handler's error stops the consumer.

    ``client``: ``boto3.client("sqs")``. ``handler`` is decorated with :func:`~idempotency.idempotent_consumer` and is
    given the message as ``receive_message`` returns it. ``concurrency``: how many are handled at a time, each in a
    thread. ``pause``: seconds before a message that failed is delivered again, rounded up to whole seconds. ``poll``:
    seconds that SQS waits for messages; a stop takes up to so much more than the messages in hand.
    ``dead_letter``: URL of the queue for dead letters, which have the attributes and the group of their messages.
    Default None: SQS moves them to a queue by the redrive policy; until then each is delivered again, and not handled.
    With neither, a dead letter is delivered until the queue's retention ends, and a handler with ``max_attempts`` is
    refused. The redrive policy counts every delivery, also those that met a running handler: its maxReceiveCount should
    be much higher than ``max_attempts``.
    The client needs the permission GetQueueAttributes, on both queues. Raises
    :class:`~idempotency.errors.ConfigurationError` for what cannot work, and the errors of boto3. Where the network or
    SQS fails during a poll, nothing is raised, and the poll is repeated.
    """
    require_handler(handler, asynchronous=False)
    _check(concurrency=(concurrency, 1, math.inf), pause=(pause, 0, _LONGEST_INVISIBLE), poll=(poll, 1, 20))
    queue = _Queue.open(client, queue_url, pause, poll, dead_letter)
    queue.check(handler.max_attempts)
    warn_if_ttl_is_short(handler, queue.retention, f"the queue {queue.name}")
    _consume(queue, handler, concurrency, stop or threading.Event())


def _consume(queue: _Queue, handler: SyncHandler[Any, Any], concurrency: int, stop: threading.Event) -> None:
    running: set[Future[None]] = set()

    def over() -> bool:
        return stop.is_set() or any(each.done() and each.exception() for each in running)

    with ThreadPoolExecutor(concurrency, "idempotency-sqs") as threads:
        while not over():
            # Not more than there are threads: no other consumer could have a message that waits here.
            if len(running) == concurrency:
                wait(running, return_when=FIRST_COMPLETED)
            else:
                deliveries = queue.receive(concurrency - len(running))
                if over():
                    queue.give_back(deliveries)
                else:
                    running.update(threads.submit(handle_sync, handler, each) for each in deliveries)
            running.difference_update([each for each in running if each.done() and not each.exception()])
    for each in running:
        each.result()
    # Writes in the background must end before the caller closes the store, its client or its engine.
    drain_sync()


@dataclass(frozen=True, slots=True)
class _Queue:
    """A queue that is polled.

    ``visibility``: its visibility time-out, ``retention``: how long it stores messages, both in seconds.
    ``deliveries``: the number of deliveries after which its redrive policy makes a message a dead letter.
    ``circular``: whether its dead letters would come back to it.
    """

    client: Any
    url: str
    visibility: int
    retention: int
    deliveries: int | None
    pause: float
    poll: int
    dead_letter: str | None
    circular: bool

    @classmethod
    def open(cls, client: Any, url: str, pause: float, poll: int, dead_letter: str | None) -> _Queue:
        def ask(url: str, *names: str) -> dict[str, str]:
            found: dict[str, str] = client.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
            return found

        found = ask(url, "VisibilityTimeout", "MessageRetentionPeriod", "RedrivePolicy", "QueueArn")
        redrive = json.loads(found.get("RedrivePolicy") or "{}").get("maxReceiveCount")
        return cls(
            client,
            url,
            int(found["VisibilityTimeout"]),
            int(found["MessageRetentionPeriod"]),
            None if redrive is None else int(redrive),
            pause,
            poll,
            dead_letter,
            # One queue may have several URLs, but it has one ARN.
            dead_letter is not None and ask(dead_letter, "QueueArn")["QueueArn"] == found["QueueArn"],
        )

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def ordered(self) -> bool:
        return self.name.endswith(".fifo")

    def check(self, max_attempts: int | None) -> None:
        if not self.visibility:
            raise ConfigurationError(f"{self.name}: the queue's VisibilityTimeout is 0, so that every message repeats")
        if self.circular:
            raise ConfigurationError(f"{self.name}: its dead letters cannot go to the same queue")
        if self.dead_letter is not None and self.dead_letter.endswith(".fifo") and not self.ordered:
            raise ConfigurationError(f"{self.name}: its messages have no group, and dead_letter= is a FIFO queue")
        if max_attempts is None:
            return
        if self.dead_letter is None and self.deliveries is None:
            raise ConfigurationError(f"{self.name}: max_attempts needs dead_letter=, or a redrive policy of the queue")
        if self.deliveries is not None and self.deliveries < max_attempts:
            raise ConfigurationError(
                f"{self.name}: the queue's maxReceiveCount is {self.deliveries}, which is less than"
                f" max_attempts={max_attempts}; deliveries that meet a running handler count too"
            )

    def receive(self, most: int) -> list[_Delivery]:
        try:
            answer = self.client.receive_message(
                QueueUrl=self.url,
                # SQS keeps the order of a group: it delivers no message of it while one is being handled. But one that
                # is received in the same call would have to be given back each time that the first fails, and the
                # redrive policy counts each time.
                MaxNumberOfMessages=1 if self.ordered else min(most, _MOST_RECEIVED),
                WaitTimeSeconds=self.poll,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["All"],
            )
        except (BotoCoreError, ClientError) as error:
            if not _is_transient(error):
                raise
            time.sleep(_POLL_PAUSE)
            return []
        return [_Delivery(self, message) for message in answer.get("Messages", ())]

    def give_back(self, deliveries: list[_Delivery]) -> None:
        for delivery in deliveries:
            # Without it SQS delivers the message when its visibility time-out is over.
            with suppress(BotoCoreError, ClientError):
                self.hide(delivery.message, 0)

    def hide(self, message: Mapping[str, Any], seconds: float) -> None:
        self.client.change_message_visibility(
            QueueUrl=self.url,
            ReceiptHandle=message["ReceiptHandle"],
            VisibilityTimeout=min(math.ceil(seconds), _LONGEST_INVISIBLE),
        )

    def delete(self, message: Mapping[str, Any]) -> None:
        self.client.delete_message(QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"])


class _Delivery:
    """One message of a queue that is polled."""

    def __init__(self, queue: _Queue, message: Mapping[str, Any]) -> None:
        self.message = message
        self.heartbeat = queue.visibility / 3
        self._queue = queue
        self._changing = threading.Lock()
        self._settled = False

    @property
    def attempt(self) -> int:
        return int(self.message["Attributes"]["ApproximateReceiveCount"])

    @property
    def body(self) -> bytes | None:
        return as_bytes(self.message["Body"])

    def key(self, message: Mapping[str, Any], /) -> str:
        return message_key(self._queue.name, message)

    def settle(self, delivered: Delivered, /) -> None:
        with self._changing:
            # An extension after the settlement would hide the message for too long.
            self._settled = True
            self._settle(delivered)

    def _settle(self, delivered: Delivered) -> None:
        queue, message = self._queue, self.message
        match delivered:
            case Done() | Replayed():
                queue.delete(message)
            case Retry(after):
                # The redrive policy counts this delivery too. If we gave it back faster than SQS does by itself, every
                # message would be a dead letter after some seconds without the store.
                queue.hide(message, after if queue.deliveries is None else max(after, queue.visibility))
            case DeadLetter(reason) if queue.dead_letter is not None:
                send_dead_letter(queue.client, queue.dead_letter, message, self.key(message), reason)
                queue.delete(message)
            case Failed():
                queue.hide(message, queue.pause)
            case DeadLetter():
                # SQS delivers it again, after each visibility time-out, until the redrive policy moves it.
                pass

    def extend(self) -> None:
        with self._changing:
            if not self._settled:
                self._queue.hide(self.message, self._queue.visibility)


def _is_transient(error: Exception) -> bool:
    """Return whether a poll that failed may succeed when it is repeated."""
    if not isinstance(error, ClientError):
        return isinstance(error, ConnectionError | HTTPClientError)
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or status == 429 or "Throttl" in code or code == "OverLimit"


def _check(**options: tuple[float, float, float]) -> None:
    for name, (value, least, most) in options.items():
        if not least <= value <= most:
            raise ConfigurationError(f"{name} must be from {least} to {most}, not {value!r}")
