"""A topic on the mock cluster that librdkafka brings, which speaks Kafka's protocol over TCP; one per process.

It keeps everything in memory and lacks the administrative requests: topics are made through its C interface.
"""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from typing import Any

from confluent_kafka import Consumer, Message, Producer, TopicPartition, cimpl

PARTITIONS = 2
SESSION_TIMEOUT_MS = 2000
"""After which the partitions of a killed consumer go to another one; Kafka's own default is 45 seconds."""

_BROKER = 1
_UNKNOWN_TOPIC = 3
_REBALANCE_DELAY_MS = 50


class MockCluster:
    """One broker, for as long as the process lives. Its threads are not inherited by a fork."""

    def __init__(self) -> None:
        # The extension module is linked to librdkafka, so its symbols are found through it.
        self._lib = ctypes.CDLL(cimpl.__file__)
        for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
            getattr(self._lib, name).restype = ctypes.c_void_p
        self._lib.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
        why = ctypes.create_string_buffer(512)
        options = ctypes.c_void_p(self._lib.rd_kafka_conf_new())
        self._lib.rd_kafka_conf_set(options, b"log_level", b"0", why, ctypes.c_size_t(512))
        handle = self._lib.rd_kafka_new(0, options, why, ctypes.c_size_t(512))
        assert handle, why.value
        self._mock = ctypes.c_void_p(self._lib.rd_kafka_mock_cluster_new(ctypes.c_void_p(handle), 1))
        self._lib.rd_kafka_mock_group_initial_rebalance_delay_ms(self._mock, _REBALANCE_DELAY_MS)

    @property
    def servers(self) -> str:
        """The address of its broker."""
        address: bytes = self._lib.rd_kafka_mock_cluster_bootstraps(self._mock)
        return address.decode()

    def create(self, topic: str, partitions: int) -> None:
        assert self._lib.rd_kafka_mock_topic_create(self._mock, topic.encode(), partitions, 1) == 0

    def fail_next(self, api: int, error: int) -> None:
        """Answer the next request of a kind, by its API key, with an error code."""
        self._lib.rd_kafka_mock_broker_push_request_error_rtts(
            self._mock, ctypes.c_int32(_BROKER), ctypes.c_int16(api), ctypes.c_size_t(1), ctypes.c_int(error), 0
        )

    def away(self, yes: bool) -> None:
        """Close the broker's connections and accept none, or accept them again."""
        change = self._lib.rd_kafka_mock_broker_set_down if yes else self._lib.rd_kafka_mock_broker_set_up
        change(self._mock, ctypes.c_int32(_BROKER))

    def hang(self, yes: bool) -> None:
        """Answer each request after 20 seconds, or at once again; connections that wait for answers go on waiting."""
        milliseconds = 20_000 if yes else 0
        self._lib.rd_kafka_mock_broker_set_rtt(self._mock, ctypes.c_int32(_BROKER), milliseconds)

    def hide(self, topic: str) -> None:
        """Know nothing of a topic, which is else made when it is asked for."""
        self._lib.rd_kafka_mock_topic_set_error(self._mock, topic.encode(), _UNKNOWN_TOPIC)

    def failed(self, api: int) -> bool:
        """Say whether that request came."""
        left = ctypes.c_size_t()
        found = self._lib.rd_kafka_mock_broker_error_stack_cnt(
            self._mock, ctypes.c_int32(_BROKER), ctypes.c_int16(api), ctypes.byref(left)
        )
        assert found == 0, found
        return left.value == 0


_starting = threading.Lock()


def cluster() -> MockCluster:
    """The cluster of this process."""
    with _starting:
        return _cluster()


@functools.cache
def _cluster() -> MockCluster:
    return MockCluster()


class Topic:
    """One topic, written and looked at from outside of any consumer group."""

    def __init__(self, name: str, group: str = "", partitions: int = PARTITIONS) -> None:
        cluster().create(name, partitions)
        self._partitions = [TopicPartition(name, number) for number in range(partitions)]
        self.name = name
        servers = {"bootstrap.servers": cluster().servers, "log_level": 0}
        self._producer = Producer({**servers, "linger.ms": 0})
        watching = {"group.id": group or f"{name}-watch", "enable.auto.commit": False, "fetch.wait.max.ms": 10}
        self._consumer = Consumer({**servers, **watching})

    def produce(self, value: bytes, *, partition: int = 0, key: bytes | None = None, **headers: str) -> None:
        """Produce a message and wait until it is stored."""
        failed: list[Any] = []
        self._producer.produce(
            self.name, value, key, partition, headers=headers, on_delivery=lambda error, _: failed.append(error)
        )
        assert self._producer.flush(10) == 0
        assert failed == [None], failed

    def high(self) -> list[int]:
        """Return the high-water mark of each partition."""
        return [self._consumer.get_watermark_offsets(each, timeout=60)[1] for each in self._partitions]

    def committed(self) -> list[int]:
        """Return the group's committed offset in each partition, 0 where there is none."""
        return [max(each.offset, 0) for each in self._consumer.committed(self._partitions, timeout=10)]

    def read(self) -> list[Message]:
        """Return all messages, without a group."""
        self._consumer.assign([TopicPartition(each.topic, each.partition, 0) for each in self._partitions])
        wanted, found = sum(self.high()), list[Message]()
        while len(found) < wanted:
            message = self._consumer.poll(10)
            assert message is not None, f"{len(found)} of {wanted} messages"
            assert message.error() is None, message.error()
            found.append(message)
        self._consumer.unassign()
        return found

    def close(self) -> None:
        self._consumer.close()


class KafkaRig:
    """The topic ``place`` with two partitions and the consumer group of that name; ``<place>_dead`` for dead letters.

    Messages carry the header ``id``.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.topic = Topic(place, place)
        self.dead_letters = Topic(f"{place}_dead", partitions=1)

    def publish(self, order: dict[str, Any], *, elsewhere: bool = False) -> None:
        self.topic.produce(json.dumps(order).encode(), partition=int(elsewhere), id=order["key"])

    def unsettled(self) -> int:
        return sum(self.topic.high()) - sum(self.topic.committed())

    def dead(self) -> int:
        return sum(self.dead_letters.high())

    def environment(self) -> dict[str, Any]:
        return {"servers": cluster().servers}

    def close(self) -> None:
        self.topic.close()
        self.dead_letters.close()
