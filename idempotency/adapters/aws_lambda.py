"""AWS Lambda behind an SQS queue.

    @idempotent_consumer(store, consumer="billing", session=Session)
    def on_order(record, session): ...

    lambda_handler = batch(on_order)

Key: see :mod:`idempotency.adapters.sqs`, which reads the same key from the same message.
The event source mapping must report partial failures, ``FunctionResponseTypes: [ReportBatchItemFailures]``: without
that Lambda ignores the answer, and deletes messages that failed too.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from idempotency._brokers.sqs import message_key, send_dead_letter
from idempotency.adapters._body import as_bytes
from idempotency.adapters._delivery import handle_sync, require_handler
from idempotency.consumer import DeadLetter, Delivered, Done, Failed, Replayed, Retry, SyncHandler
from idempotency.errors import ConfigurationError


def batch(
    handler: SyncHandler[Any, Any], *, dead_letter: str | None = None, client: Any = None
) -> Callable[[Mapping[str, Any], Any], dict[str, Any]]:
    """Make a Lambda handler of partial batches; ``handler`` is given each record as Lambda passes it.

    The event source mapping must have ``ReportBatchItemFailures``: without it Lambda deletes messages that failed too.
    A message that failed, or whose duplicate is being handled, is delivered again after the queue's visibility
    time-out. The messages after it in the same FIFO group are not handled, and delivered again as well.
    ``dead_letter``: URL of the queue for dead letters, and ``client``: the SQS client that sends them. Default None:
    they count as failed, so that the queue's redrive policy moves them there.
    An error that stops a consumer, by ``"stop"``, is raised after the rest of the batch is handled: Lambda counts an
    error, and SQS delivers the whole batch again.
    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """
    require_handler(handler, asynchronous=False)
    if (dead_letter is None) is not (client is None):
        raise ConfigurationError("dead_letter= and client= need each other")

    def handle_batch(event: Mapping[str, Any], context: Any = None) -> dict[str, Any]:
        failed: list[str] = []
        blocked_groups: set[str] = set()
        errors: list[Exception] = []
        for record in event["Records"]:
            delivery = _Delivery(record, client, dead_letter)
            if delivery.group not in blocked_groups:
                try:
                    handle_sync(handler, delivery)
                except Exception as error:
                    errors.append(error)
            if not delivery.settled:
                failed.append(record["messageId"])
                blocked_groups.update(filter(None, [delivery.group]))
        if errors:
            raise errors[0]
        return {"batchItemFailures": [{"itemIdentifier": each} for each in failed]}

    return handle_batch


class _Delivery:
    """One record of a Lambda event, which Lambda settles."""

    heartbeat = None

    def __init__(self, record: Mapping[str, Any], client: Any, dead_letter: str | None) -> None:
        self.message = record
        self.settled = False
        self._client = client
        self._dead_letter = dead_letter
        self._queue = record["eventSourceARN"].rpartition(":")[2]

    @property
    def attempt(self) -> int:
        return int(self.message["attributes"]["ApproximateReceiveCount"])

    @property
    def group(self) -> str | None:
        """Return the group whose order the message must keep; a group of a standard queue has no order."""
        attributes: Mapping[str, str] = self.message["attributes"]
        return attributes.get("MessageGroupId") if self._queue.endswith(".fifo") else None

    @property
    def body(self) -> bytes | None:
        return as_bytes(self.message["body"])

    def key(self, message: Mapping[str, Any], /) -> str:
        return message_key(self._queue, _received(message))

    def settle(self, delivered: Delivered, /) -> None:
        match delivered:
            case Done() | Replayed():
                self.settled = True
            case DeadLetter(reason) if self._dead_letter is not None:
                message = _received(self.message)
                send_dead_letter(self._client, self._dead_letter, message, self.key(self.message), reason)
                self.settled = True
            case Retry() | Failed() | DeadLetter():
                pass

    def extend(self) -> None:
        """Do nothing: the visibility time-out of a queue behind Lambda is longer than its functions may run."""


def _received(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of Lambda in the form in which boto3 receives a message."""
    attributes = {}
    for name, value in record.get("messageAttributes", {}).items():
        attributes[name] = {"DataType": value["dataType"]}
        if value.get("binaryValue"):
            attributes[name]["BinaryValue"] = base64.b64decode(value["binaryValue"])
        else:
            attributes[name]["StringValue"] = value["stringValue"]
    return {
        "MessageId": record["messageId"],
        "Body": record["body"],
        "Attributes": record["attributes"],
        "MessageAttributes": attributes,
    }
