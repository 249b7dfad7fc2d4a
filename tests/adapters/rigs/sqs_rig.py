"""A queue of SQS on a moto server of this test run, and the consumer process of the SQS adapter."""

from __future__ import annotations

import atexit
import functools
import json
import signal
import sys
import threading
from typing import Any

import boto3

from idempotency import idempotent_consumer
from idempotency.adapters.sqs import consume
from tests.adapters.rigs.orders import Work
from tests.kit.servers import LOOPBACK, Server, listening

VISIBILITY = 2
"""Seconds after which a message of a dead consumer is delivered again."""


class MotoServer(Server):
    """A private SQS."""

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "--host", LOOPBACK, "--port", str(self.port)]

    def _answers(self) -> bool:
        return listening(self.port)


_starting = threading.Lock()


def moto() -> MotoServer:
    """The server of this process and those it starts; cases that run at a time share it."""
    with _starting:
        return _start()


@functools.cache
def _start() -> MotoServer:
    server = MotoServer()
    atexit.register(server.stop)
    return server


def connect(url: str) -> Any:
    """Make a client; its credentials are no one's."""
    names = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "eu-central-1"}
    # The default session is not for threads.
    return boto3.Session(**names).client("sqs", endpoint_url=url)


def text(value: str) -> dict[str, str]:
    """Make a message attribute."""
    return {"DataType": "String", "StringValue": value}


class Rig:
    """A standard queue whose messages carry their key as an attribute, a queue of dead letters, and this module."""

    def __init__(self, place: str) -> None:
        self._client = connect(moto().url)
        visibility = {"VisibilityTimeout": str(VISIBILITY)}
        self._dead = self._client.create_queue(QueueName=f"{place}_dead")["QueueUrl"]
        self._url = self._client.create_queue(QueueName=place, Attributes=visibility)["QueueUrl"]

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        attributes = {"Idempotency-Key": text(order["key"])}
        self._client.send_message(QueueUrl=self._url, MessageBody=json.dumps(order), MessageAttributes=attributes)

    def unsettled(self) -> int:
        return count(self._client, self._url)

    def dead(self) -> int:
        return count(self._client, self._dead)

    def command(self) -> list[str]:
        return ["-m", __name__]

    def environment(self) -> dict[str, Any]:
        return {"server": moto().url, "queue": self._url, "dead": self._dead}

    def close(self) -> None:
        for url in (self._url, self._dead):
            self._client.delete_queue(QueueUrl=url)
        self._client.close()


def count(client: Any, url: str) -> int:
    """Count the messages of a queue, those in flight too."""
    names = [f"ApproximateNumberOfMessages{which}" for which in ("", "NotVisible", "Delayed")]
    attributes = client.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
    return sum(int(attributes[name]) for name in names)


def main() -> None:
    work, stop = Work(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    store, options = work.open(asynchronous=False)
    place = work.setting.extra

    @idempotent_consumer(store, consumer="billing", **options)
    def on_order(message: dict[str, Any]) -> dict[str, Any]:
        return work.handle_sync(json.loads(message["Body"]))

    consume(connect(place["server"]), place["queue"], on_order, pause=0.1, poll=1, dead_letter=place["dead"], stop=stop)


if __name__ == "__main__":
    main()
