"""Debezium in place of a relay: our own reading of its options, applied to what a slot really delivers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotency import ConfigurationError
from idempotency.outbox import Message, Outbox
from idempotency.outbox._debezium import connector_configuration
from idempotency.outbox._log import LogRelay
from idempotency.outbox._pgoutput import Emitted, Insert, Relation, decode
from idempotency.outbox.publishers._topic import DEFAULT_TOPIC, topic_of
from tests.outbox.kit.logical import Recorder, slot_of

EMITTED: list[dict[str, Any]] = [
    {"aggregate_id": 1, "type": "OrderPlaced", "payload": {"total": 7, "note": "ü"}},
    {"aggregate_id": "ä/2", "type": "OrderPaid", "payload": "paid", "headers": {"tenant": "blue", "trace": "1-2"}},
    {"aggregate_id": 1, "type": "OrderForgotten", "payload": None},
]

# The options of the Outbox Event Router of Debezium 3 that may be set here. The field for the time is not among them:
# it must be a column of a logical type, and none of ours is.
ROUTER_OPTIONS = {
    "type",
    "predicate",
    "table.field.event.id",
    "table.field.event.key",
    "table.field.event.payload",
    "table.fields.additional.placement",
    "table.fields.additional.error.on.missing",
    "table.op.invalid.behavior",
    "route.by.field",
    "route.topic.replacement",
    "route.tombstone.on.empty.payload",
}


@dataclass(frozen=True)
class Sent:
    """A record as a consumer sees it."""

    topic: str
    key: str
    headers: dict[str, str]
    value: bytes | None


class Connector:
    """What Debezium 3 does with these options, as far as an outbox needs it."""

    def __init__(self, config: dict[str, str]) -> None:
        self._config = config

    def records(self, changes: list[bytes]) -> Iterator[Sent]:
        """Route what a slot delivers."""
        decoded = self._option("transforms") == "decode,outbox"
        topics = re.compile(self._option("predicates.isOutbox.pattern"))
        relations: dict[int, Relation] = {}
        for data in changes:
            topic, row = "", dict[str, Any]()
            match decode(data):
                case Relation(oid) as relation:
                    relations[oid] = relation
                case Insert(oid, values):
                    relation = relations[oid]
                    name = f"{relation.schema}.{relation.name}"
                    if not decoded and re.fullmatch(self._option("table.include.list"), name):
                        topic = f"{self._option('topic.prefix')}.{name}"
                        row = dict(zip(relation.columns, map(_text, values), strict=True))
                case Emitted(True, prefix, content) if decoded:
                    if re.fullmatch(self._option("message.prefix.include.list"), prefix):
                        topic, row = f"{self._option('topic.prefix')}.message", json.loads(content)
            if topics.fullmatch(topic):
                yield self._route(row)

    def _route(self, row: dict[str, Any]) -> Sent:
        event = partial(self._of_router, "table.field.event.")
        headers = {"id": row[event("id")]}
        missing_fails = self._of_router("table.fields.additional.", "error.on.missing") == "true"
        for placed in self._of_router("table.fields.additional.", "placement").split(","):
            column, placement, alias = placed.split(":")
            assert placement == "header"
            assert column in row or not missing_fails
            if row.get(column) is not None:
                headers[alias] = row[column]
        payload = row.get(event("payload"))
        assert payload is not None or self._of_router("route.", "tombstone.on.empty.payload") == "true"
        if payload is not None and "BinaryDataConverter" in self._option("value.converter"):
            payload = bytes.fromhex(payload.removeprefix("\\x"))
        routed = row[self._of_router("route.", "by.field")]
        topic = self._of_router("route.", "topic.replacement").replace("${routedByValue}", routed)
        return Sent(topic, row[event("key")], headers, payload.encode() if isinstance(payload, str) else payload)

    def _of_router(self, group: str, name: str) -> str:
        return self._option(f"transforms.outbox.{group}{name}")

    def _option(self, name: str) -> str:
        return self._config[name]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def _by_us(message: Message) -> Sent:
    headers = message.wire_headers()
    own = {name: headers.pop(name) for name in message.headers}
    # The one difference: the router makes no header of each of our own ones.
    if own:
        headers["headers"] = json.dumps(own, separators=(",", ":"))
    return Sent(topic_of(DEFAULT_TOPIC)(message), message.aggregate_id, headers, message.payload)


@pytest.mark.parametrize("mode", ["table", "message"])
async def test_debezium_sends_what_our_relay_sends(log_engine: AsyncEngine, mode: Any) -> None:
    """Topic, key, headers and value are the same, so that consumers do not see who sends."""
    outbox, publisher = Outbox(mode=mode), Recorder()
    relay = LogRelay(log_engine, publisher, outbox=outbox, slot=slot_of(log_engine))
    await relay.drain()
    async with log_engine.begin() as connection:
        for message in EMITTED:
            await outbox.emit(connection, aggregate_type="order", **message)
        await connection.execute(text("SELECT pg_logical_emit_message(true, 'heartbeat', 'other')"))
    config = json.loads(connector_configuration(outbox, log_engine.url))["config"]

    def peek(connection: Connection) -> list[bytes]:
        messages = ", 'messages', 'true'" if mode == "message" else ""
        found = connection.execute(
            text(
                f"SELECT data FROM pg_logical_slot_peek_binary_changes('{slot_of(log_engine)}', NULL, NULL,"
                f" 'proto_version', '1', 'publication_names', '{config['publication.name']}'{messages})"
            )
        )
        return [bytes(data) for (data,) in found]

    async with log_engine.connect() as connection:
        changes = await connection.run_sync(peek)
    records = list(Connector(config).records(changes))
    await relay.drain()

    assert records == [_by_us(message) for message in publisher.messages]
    assert [(each.topic, each.key, each.value) for each in records] == [
        ("outbox.event.order", "1", b'{"total":7,"note":"\\u00fc"}'),
        ("outbox.event.order", "ä/2", b'"paid"'),
        ("outbox.event.order", "1", None),
    ]
    assert [sorted(each.headers) for each in records] == [
        ["eventType", "id"],
        ["eventType", "headers", "id"],
        ["eventType", "id"],
    ]


def test_what_the_connector_is_given() -> None:
    """No password, no option that the router does not know, and the slot and publication of our relay."""
    url = "postgresql+asyncpg://shop:secret@db.example:6432/orders"
    printed = connector_configuration(Outbox("sales.events"), url)
    config = json.loads(printed)["config"]

    assert "secret" not in printed
    assert (config["database.hostname"], config["database.port"]) == ("db.example", "6432")
    assert config["table.include.list"] == r"sales\.events"
    assert config["slot.name"] == config["publication.name"] == "idempotency_events"
    assert config["publication.autocreate.mode"] == "disabled"
    router = {name.removeprefix("transforms.outbox.") for name in config if name.startswith("transforms.outbox.")}
    assert router <= ROUTER_OPTIONS
    with pytest.raises(ConfigurationError, match="PostgreSQL"):
        connector_configuration(Outbox(), "mysql://db/orders")
