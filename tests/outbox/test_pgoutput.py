"""The decoder of pgoutput, against bytes that PostgreSQL 15 and 18 wrote, and against any other bytes."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from idempotency.outbox._pgoutput import Begin, Commit, Emitted, Insert, MalformedError, Relation, decode

BEGIN = "42000000000153ff70000304644289e9ac000002d7"
RELATION = (
    "52000040017075626c6963006f7574626f780064000b00637265617465645f6d730000000014ffffffff017365710000000014ffffffff"
    "0069640000000b86ffffffff00616767726567617465747970650000000413000001030061676772656761746569640000000413000001"
    "030074797065000000041300000103007061796c6f61640000000011ffffffff00686561646572730000000019ffffffff006275636b6574"
    "0000000015ffffffff00617474656d7074730000000017ffffffff00617661696c61626c655f6d730000000014ffffffff"
)
INSERT = (
    "49000040014e000b740000000d31373634343030303030303030740000000131740000002430303030303030302d303030302d343030302d"
    "383030302d30303030303030303030303174000000056f726465727400000003c3b6377400000006506c61636564740000000a5c78303066"
    "66376237646e7400000001337400000001306e"
)
EMITTED = "4d01000000000153ff206f7574626f78000000000a7b226964223a2231227d"
COMMIT = "4300000000000153ff70000000000153ffa0000304644289e9ac"
OUTSIDE_OF_A_TRANSACTION = "4d0000000000017226487800000000056c6f6f7365"
COLUMNS = "created_ms seq id aggregatetype aggregateid type payload headers bucket attempts available_ms"


@pytest.mark.parametrize(
    ("written", "change"),
    [
        (BEGIN, Begin(0x153FF70, 1795938389.70718)),
        (RELATION, Relation(16385, "public", "outbox", tuple(COLUMNS.split()))),
        (
            INSERT,
            Insert(
                16385,
                [
                    b"1764400000000",
                    b"1",
                    b"00000000-0000-4000-8000-000000000001",
                    b"order",
                    "ö7".encode(),
                    b"Placed",
                    rb"\x00ff7b7d",
                    None,
                    b"3",
                    b"0",
                    None,
                ],
            ),
        ),
        (EMITTED, Emitted(True, "outbox", b'{"id":"1"}')),
        (OUTSIDE_OF_A_TRANSACTION, Emitted(False, "x", b"loose")),
        (COMMIT, Commit(0x153FF70, 0x153FFA0)),
        ("540000000100000040010a", None),
    ],
)
def test_what_postgresql_wrote(written: str, change: object) -> None:
    """Each kind of message is read; a truncation is of no use."""
    assert decode(bytes.fromhex(written)) == change


@pytest.mark.parametrize("written", [BEGIN, RELATION, INSERT, EMITTED, COMMIT])
def test_a_message_that_was_cut_off_is_malformed(written: str) -> None:
    """No part of a message is taken for the whole, wherever it ends."""
    whole = bytes.fromhex(written)
    for length in range(len(whole)):
        with pytest.raises(MalformedError):
            decode(whole[:length])


@given(kind=st.sampled_from([b"B", b"C", b"R", b"I", b"M", b"I\0\0\0\1N", b""]), rest=st.binary(max_size=64))
@example(kind=b"I\0\0\0\1N", rest=b"\0\1t\xff\xff\xff\xf0")
@example(kind=b"R\0\0\0\1a\0\xff\0", rest=b"")
def test_any_bytes_are_read_or_malformed(kind: bytes, rest: bytes) -> None:
    """There is no other error, and no loop without end."""
    with suppress(MalformedError):
        decode(kind + rest)
