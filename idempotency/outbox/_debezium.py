"""Configure Debezium in place of a relay: its connector for PostgreSQL with its Outbox Event Router."""

from __future__ import annotations

import json
import re

from sqlalchemy.engine import URL, make_url

from idempotency._outbox.emit import Outbox
from idempotency._outbox.message import ID_HEADER, TYPE_HEADER
from idempotency.errors import ConfigurationError
from idempotency.outbox._names import publication_of, slot_of
from idempotency.outbox.publishers._topic import DEFAULT_TOPIC

TOPIC_PREFIX = "outbox"
PASSWORD = "${env:DATABASE_PASSWORD}"  # noqa: S105 - Kafka Connect reads it from its own environment
_ROUTED = "isOutbox"

HEADERS_COLUMN = "headers"
"""The row's own headers are one header of this name, as JSON: the router cannot make one header of each."""


def connector_configuration(outbox: Outbox, url: str | URL, *, publication: str | None = None) -> str:
    """Return the configuration as JSON, as it is sent to Kafka Connect.

    Records have the topic, the key, the value and the headers ``id`` and ``eventType`` that our publishers write. The
    publication and the slot are those of :class:`LogRelay`: it creates them, and is stopped before the connector
    starts. Debezium deletes no rows. After its first snapshot, rows may be deleted as soon as they are committed.
    Raises :class:`~idempotency.errors.ConfigurationError` for another database than PostgreSQL.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "postgresql":
        raise ConfigurationError(f"the connector is for PostgreSQL, not for {parsed.get_backend_name()}")
    config = {
        **_connector(parsed),
        "slot.name": slot_of(outbox.tables),
        "publication.name": publication or publication_of(outbox.tables),
        **(_of_messages(outbox) if outbox.mode == "message" else _of_table(outbox)),
        **_router(),
    }
    return json.dumps({"name": slot_of(outbox.tables), "config": config}, indent=2)


def _connector(url: URL) -> dict[str, str]:
    return {
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "database.hostname": url.host or "localhost",
        "database.port": str(url.port or 5432),
        "database.user": url.username or "postgres",
        "database.password": PASSWORD,
        "database.dbname": url.database or "postgres",
        "topic.prefix": TOPIC_PREFIX,
        "plugin.name": "pgoutput",
        # The publication has insertions only, so that nothing else is decoded.
        "publication.autocreate.mode": "disabled",
        "tombstones.on.delete": "false",
        # While this database is idle, the log of the others would be retained.
        "heartbeat.interval.ms": "10000",
        "key.converter": "org.apache.kafka.connect.storage.StringConverter",
        "header.converter": "org.apache.kafka.connect.storage.StringConverter",
    }


def _of_table(outbox: Outbox) -> dict[str, str]:
    table = outbox.tables.messages
    name = f"{table.schema or 'public'}.{table.name}"
    return {
        "table.include.list": re.escape(name),
        # The rows that are there already are sent first.
        "snapshot.mode": "initial",
        # The payload is bytes, and is written as it is; what is not routed, such as a heartbeat, is JSON.
        "value.converter": "io.debezium.converters.BinaryDataConverter",
        "value.converter.delegate.converter.type": "org.apache.kafka.connect.json.JsonConverter",
        "value.converter.delegate.converter.type.schemas.enable": "false",
        "transforms": "outbox",
        **_only_topic(f"{TOPIC_PREFIX}.{name}", "outbox"),
    }


def _of_messages(outbox: Outbox) -> dict[str, str]:
    return {
        "message.prefix.include.list": re.escape(outbox.prefix),
        "snapshot.mode": "no_data",
        "value.converter": "org.apache.kafka.connect.storage.StringConverter",
        "transforms": "decode,outbox",
        "transforms.decode.type": ("io.debezium.connector.postgresql.transforms.DecodeLogicalDecodingMessageContent"),
        **_only_topic(f"{TOPIC_PREFIX}.message", "decode", "outbox"),
    }


def _only_topic(topic: str, *transforms: str) -> dict[str, str]:
    # Heartbeats and changes of the schema pass through as they are.
    return {
        "predicates": _ROUTED,
        f"predicates.{_ROUTED}.type": "org.apache.kafka.connect.transforms.predicates.TopicNameMatches",
        f"predicates.{_ROUTED}.pattern": re.escape(topic),
        **{f"transforms.{name}.predicate": _ROUTED for name in transforms},
    }


def _router() -> dict[str, str]:
    options = {
        "type": "io.debezium.transforms.outbox.EventRouter",
        "table.field.event.id": ID_HEADER,
        "table.field.event.key": "aggregateid",
        "table.field.event.payload": "payload",
        "table.fields.additional.placement": (f"type:header:{TYPE_HEADER},{HEADERS_COLUMN}:header:{HEADERS_COLUMN}"),
        # A message without headers of its own has no such field.
        "table.fields.additional.error.on.missing": "false",
        "route.by.field": "aggregatetype",
        "route.topic.replacement": DEFAULT_TOPIC.format(aggregate_type="${routedByValue}", type=""),
        "route.tombstone.on.empty.payload": "true",
    }
    return {f"transforms.outbox.{name}": value for name, value in options.items()}
