"""The stream of the taskiq adapter on NATS, and its worker."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from nats.js.api import ConsumerConfig

from tests.adapters.rigs import nats_server
from tests.adapters.rigs.taskiq_rabbit_rig import COMMAND, message

# taskiq does not tell NATS that a task still runs, and a message that is acknowledged late is delivered twice.
ACK_WAIT = 4.0


class Rig(nats_server.NatsRig):
    """The stream and the durable consumer that taskiq-nats would make."""

    def consumer(self) -> ConsumerConfig:
        return replace(super().consumer(), ack_wait=ACK_WAIT)

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        body = json.dumps(message(order)).encode()
        self.run(lambda stream: stream.publish(self.place, body))

    def command(self) -> list[str]:
        return COMMAND

    def environment(self) -> dict[str, Any]:
        return {"broker": "nats", "url": nats_server.url()}
