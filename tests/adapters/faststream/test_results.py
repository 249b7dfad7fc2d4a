"""How the answer of a FastStream handler is recorded and read again."""

from __future__ import annotations

from typing import Any

import pytest
from faststream import Response
from faststream.rabbit import RabbitExchange, RabbitResponse

from idempotency.adapters.faststream._results import Acknowledged, Recorded, ResultCodec
from tests.adapters.rigs.faststream_brokers import annotated, bare


def kafka_response() -> Any:
    from faststream.confluent import KafkaResponse

    return KafkaResponse(b"\x00raw", headers={"a": "b"}, key=b"\xff", timestamp_ms=7, correlation_id="c")


@pytest.mark.parametrize(
    ("broker", "value"),
    [
        ("confluent", kafka_response()),
        ("rabbit", RabbitResponse("text", priority=3, mandatory=False)),
        ("rabbit", Response(None)),
        ("rabbit", Response({"b": ["a", 1]}, headers={"b": "x"})),
    ],
)
def test_a_response_comes_back_as_it_was(broker: str, value: Any) -> None:
    codec = ResultCodec(bare, None, broker)
    kept = codec.decode(codec.encode(value))
    assert type(kept.value) is type(value)
    assert vars(kept.value) == vars(value)


def test_a_value_as_it_is_published_is_read_under_an_annotation_too() -> None:
    """As when the handler was annotated since; the other way round nobody can tell what it was."""
    assert ResultCodec(annotated, None, "rabbit").decode(b'wj{"total": 7}') == Recorded({"total": 7})
    with pytest.raises(ValueError, match="annotation has changed"):
        ResultCodec(bare, None, "rabbit").decode(b'p\x01j{"total":7}')


def test_a_response_with_what_cannot_be_kept_is_not_kept() -> None:
    codec = ResultCodec(bare, None, "rabbit")
    with pytest.raises(TypeError):
        codec.encode(RabbitResponse("text", exchange=RabbitExchange("invoices")))


def test_a_handler_that_only_acknowledged_says_so_again() -> None:
    codec = ResultCodec(annotated, None, "rabbit")
    assert codec.decode(codec.encode(Acknowledged({"multiple": True}))) == Recorded(Acknowledged({}))


def test_the_bytes_of_a_result_are_these() -> None:
    """What is stored is a contract: these are read by every later version."""
    assert ResultCodec(annotated, None, "rabbit").encode({"total": 7}) == b'p\x01j{"total":7}'
    # FastStream itself writes these two, without spaces where orjson is installed.
    assert ResultCodec(bare, None, "rabbit").encode({"total": 7}) in (b'wj{"total": 7}', b'wj{"total":7}')
    assert ResultCodec(bare, None, "rabbit").encode(Response(b"x", headers={"a": "b"})) == (
        b'r44:["Response", {"headers": ["j", {"a": "b"}]}]bx'
    )
