"""Amazon SQS through boto3, in threads.

    relay = PollingRelay(engine, SQSPublisher("https://sqs.eu-central-1.amazonaws.com/123456789012/orders.fifo"), ...)

The attributes of a message are ``id``, ``eventType`` and its own headers. In a FIFO queue its id is the deduplication
id, so that SQS drops a repeated message within five minutes, and the aggregate's id is the group. A standard queue
keeps no order and drops nothing. A message is confirmed by its entry in the answer of SQS. Payloads must be text, and
must not be empty.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from idempotency._outbox.limits import size_of
from idempotency._outbox.message import Message
from idempotency.errors import ConfigurationError
from idempotency.outbox.publisher import Outcome, Publisher, Refused, RetryLater, Sent
from idempotency.outbox.publishers._brokers import SQS
from idempotency.outbox.publishers._cloudevents import ADDED, DEFAULT_SOURCE, Format, headers_for
from idempotency.outbox.publishers._shared import NOT_TRIED, InUse, SharedClientPublisher, not_in_time
from idempotency.outbox.publishers._topic import Topic, topic_of

OPTIONS = {"delivery_timeout": float, "format": str, "source": str}
CLIENT_OPTIONS = frozenset[str]()

_MOST_BYTES = 1 << 20
"""Of a message, and of a request with all its messages."""

_MOST_ENTRIES = 10
_THREADS = 10
"""As many connections has a client of boto3 by default."""

_TYPE = "String"
_NOT_ALLOWED = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ATTRIBUTE_NAME = re.compile(r"(?!aws\.|amazon\.)[\w-](?:[\w-]|\.(?!\.|$)){0,255}", re.ASCII | re.IGNORECASE)
_GROUP = re.compile(r"[!-~]{1,128}")
_REGION = re.compile(r"sqs\.([a-z0-9-]+)\.amazonaws\.com")

_MALFORMED = frozenset(
    {
        "InvalidMessageContents",
        "InvalidParameterValue",
        "MissingParameter",
        "InvalidAttributeValue",
        "BatchRequestTooLong",
    }
)
"""The codes of a request that has a message which SQS never takes."""

_MENDABLE = re.compile("Kms|AccessDenied|Throttl|OverLimit|NonExistent|DoesNotExist")
"""In the codes of messages for which SQS blames the sender, and which an operator or time may help."""


class SQSPublisher(SharedClientPublisher["_Requests"]):
    """Publish messages to queues of SQS.

    One message of a key is in flight at a time: SQS may refuse an entry of a request, and take a later one.

    ``queue_url``: in it ``{aggregate_type}`` and ``{type}`` are replaced; or a function of the message. ``client``: a
    ``boto3.client("sqs")``, which is not closed; it should give up within ``delivery_timeout``. None: one is made, with
    the region of the URL. ``delivery_timeout``: seconds after which a batch is given up, default 30. ``format``:
    default ``"plain"``; ``"cloudevents"`` adds the attributes of CloudEvents as ``ce_...``, with ``source``: they are
    six of the ten attributes that SQS allows.

    Raises :class:`~idempotency.errors.ConfigurationError` for what cannot work.
    """

    def __init__(
        self,
        queue_url: Topic,
        *,
        client: Any = None,
        delivery_timeout: float = 15.0,
        format: Format = "plain",
        source: str = DEFAULT_SOURCE,
    ) -> None:
        super().__init__(delivery_timeout)
        self.limits = SQS if format == "plain" else replace(SQS, most_headers=(SQS.most_headers or 0) - ADDED)
        self._url_of = topic_of(queue_url)
        self._headers_of = headers_for(format, source, "ce_")
        self._region = _REGION.search(queue_url) if isinstance(queue_url, str) else None
        self._passed_in = client

    async def _send(self, used: InUse[_Requests], deadline: float, message: Message) -> Outcome:
        headers = self._headers_of(message)
        if (reason := self.limits.refusal(message) or _refusal(message, headers)) is not None:
            return Refused(reason)
        sending = Sending.of(self._url_of(message), message, headers)
        try:
            async with asyncio.timeout_at(deadline):
                return await used.client.send(sending)
        except TimeoutError:
            return not_in_time(self.delivery_timeout) if sending.begun else NOT_TRIED

    async def _open(self) -> _Requests:
        client = self._passed_in
        if client is None:
            # The relay repeats, with its own pauses.
            config = Config(
                connect_timeout=self.delivery_timeout,
                read_timeout=self.delivery_timeout,
                max_pool_connections=_THREADS,
                retries={"total_max_attempts": 1},
            )
            region = None if self._region is None else self._region[1]
            # The default session is not for threads.
            client = await asyncio.to_thread(lambda: boto3.Session().client("sqs", region_name=region, config=config))
        return _Requests(client)

    async def _close(self, requests: _Requests, /) -> None:
        requests.close()
        if self._passed_in is None:
            requests.client.close()


@dataclass(slots=True, eq=False)
class Sending:
    """One message that waits for its outcome.

    ``entry``: of a request. ``size``: its bytes, as SQS counts them. ``begun``: whether its request was made.
    """

    url: str
    entry: dict[str, Any]
    size: int
    outcome: asyncio.Future[Outcome]
    begun: bool = False

    @classmethod
    def of(cls, url: str, message: Message, headers: Mapping[str, str]) -> Sending:
        """Start to send a message to a queue."""
        attributes = {name: {"DataType": _TYPE, "StringValue": value} for name, value in headers.items()}
        entry: dict[str, Any] = {"MessageBody": (message.payload or b"").decode(), "MessageAttributes": attributes}
        if url.endswith(".fifo"):
            entry |= {"MessageGroupId": _group(message.aggregate_id), "MessageDeduplicationId": message.id}
        return cls(url, entry, _size(message, headers), asyncio.get_running_loop().create_future())


class _Requests:
    """A client, the threads that call it, and the messages that wait for the next request."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._threads = ThreadPoolExecutor(_THREADS, "idempotency-sqs")
        self._free = asyncio.Semaphore(_THREADS)
        self._waiting: list[Sending] = []
        self._running = set[asyncio.Task[None]]()

    async def send(self, sending: Sending) -> Outcome:
        """Send a message, in one request with others that are sent at once."""
        self._waiting.append(sending)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._start)
        return await sending.outcome

    def close(self) -> None:
        """End the threads; the requests that they have in hand were given up."""
        self._threads.shutdown(wait=False)

    def _start(self) -> None:
        waiting, self._waiting = self._waiting, []
        for request in in_requests(each for each in waiting if not each.outcome.done()):
            task = asyncio.create_task(self._make(request))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _make(self, request: list[Sending]) -> None:
        async with self._free:
            request = [each for each in request if not each.outcome.done()]
            if not request:
                return
            for each in request:
                each.begun = True
            outcomes = await self._outcomes(request[0].url, [each.entry for each in request])
        for sending, outcome in zip(request, outcomes, strict=True):
            if not sending.outcome.done():
                sending.outcome.set_result(outcome)

    async def _outcomes(self, url: str, entries: list[dict[str, Any]]) -> Sequence[Outcome]:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, send_together, self.client, url, entries)
        except Exception as error:
            # The connection is lost, for example.
            return [RetryLater(type(error).__name__)] * len(entries)


def in_requests(waiting: Iterable[Sending]) -> list[list[Sending]]:
    """Distribute messages among requests, each to one queue, with at most ten messages and 1 MiB."""
    requests: list[list[Sending]] = []
    last: dict[str, tuple[list[Sending], int]] = {}
    for each in waiting:
        request, size = last.get(each.url, ([], 0))
        if not request or len(request) == _MOST_ENTRIES or size + each.size > _MOST_BYTES:
            request, size = [], 0
            requests.append(request)
        request.append(each)
        last[each.url] = request, size + each.size
    return requests


def send_together(client: Any, url: str, entries: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Make a request, and return the outcome of each entry."""
    try:
        answer = client.send_message_batch(
            QueueUrl=url, Entries=[{"Id": str(number), **entry} for number, entry in enumerate(entries)]
        )
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code.rpartition(".")[2] not in _MALFORMED:
            return [RetryLater(code)] * len(entries)
        if len(entries) == 1:
            return [Refused(code)]
        # One of them is at fault, and the others are not.
        return [send_together(client, url, [entry])[0] for entry in entries]
    failed = {each["Id"]: each for each in answer.get("Failed", ())}
    return [_outcome_of(failed.get(str(number))) for number in range(len(entries))]


def from_url(url: str, options: Mapping[str, Any], /) -> Publisher:
    """Make a publisher with the options of a URL's query; the URL is the queue's, with sqs:// for https://."""
    if len(urlsplit(url).path.strip("/").split("/")) != 2:
        raise ConfigurationError("the URL of a queue is sqs://sqs.REGION.amazonaws.com/ACCOUNT/QUEUE")
    return SQSPublisher(f"https{url.removeprefix('sqs')}", **options)


def _outcome_of(failed: Mapping[str, Any] | None) -> Outcome:
    if failed is None:
        return Sent()
    code = failed["Code"]
    return Refused(code) if failed["SenderFault"] and not _MENDABLE.search(code) else RetryLater(code)


def _refusal(message: Message, headers: Mapping[str, str]) -> str | None:
    """Return why SQS would not take a message, and perhaps refuse the others of its request too."""
    if not message.payload:
        return "its payload is empty, which SQS does not take"
    if _NOT_ALLOWED.search(message.payload.decode()):
        return "its payload has a character that SQS does not take"
    for name, value in headers.items():
        if not _ATTRIBUTE_NAME.fullmatch(name):
            return f"SQS has no attributes of the name {name!r}"
        if not value or _NOT_ALLOWED.search(value):
            return f"its attribute {name!r} is empty, or has a character that SQS does not take"
    if (size := _size(message, headers)) > _MOST_BYTES:
        return f"it has {size} bytes with its attributes and their types; {_MOST_BYTES} are allowed"
    return None


def _size(message: Message, headers: Mapping[str, str]) -> int:
    return size_of(message, dict(headers)) + len(_TYPE) * len(headers)


def _group(aggregate_id: str) -> str:
    """Return the group of an aggregate: its id, or a digest of one that SQS does not allow."""
    return aggregate_id if _GROUP.fullmatch(aggregate_id) else hashlib.sha256(aggregate_id.encode()).hexdigest()
