"""The contract of contents: what a consumer receives is what was emitted."""

from __future__ import annotations

from typing import ClassVar

import pytest

from idempotency.outbox.publisher import Publisher, Refused, Sent
from idempotency.testing.publishers._common import Contract, Receive, new_message

ID = "01890a5d-ac96-774b-bcce-b302099a8057"


class ContentsContract(Contract):
    """Check id, key, type, headers and payload."""

    header_value: ClassVar[str] = "Zürich, 7 €"
    """The value of a header that must arrive as it is."""

    async def test_no_message_is_no_outcome(self, publisher: Publisher) -> None:
        """An empty batch has no outcomes."""
        assert list(await publisher.publish([])) == []

    async def test_message_arrives_with_id_key_type_and_headers(self, publisher: Publisher, received: Receive) -> None:
        """The id is in the broker's own place and in a header, next to the type and the message's own headers."""
        own = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "city": self.header_value}
        message = new_message("order-7", id=ID, type="OrderPaid", payload=b'{"total": 9}', headers=own)

        assert list(await publisher.publish([message])) == [Sent()]

        [only] = await received(1)
        assert only.id == ID
        assert only.key == ("order-7" if self.carries_keys else None)
        assert only.headers == {"id": ID, "eventType": "OrderPaid", **own}
        assert only.payload == b'{"total": 9}'

    async def test_own_headers_replace_neither_id_nor_type(self, publisher: Publisher, received: Receive) -> None:
        """A header of the message named ``id`` or ``eventType`` does not hide the real one."""
        message = new_message(id=ID, type="OrderPaid", headers={"id": "other", "eventType": "Other"})

        assert list(await publisher.publish([message])) == [Sent()]

        [only] = await received(1)
        assert only.id == ID
        assert only.headers == {"id": ID, "eventType": "OrderPaid"}

    @pytest.mark.parametrize(
        "payload", [b"", b"7", '{"city": "Zürich"}'.encode(), b"x" * 100_000], ids=["empty", "short", "utf-8", "long"]
    )
    async def test_payload_arrives_as_it_is(self, publisher: Publisher, received: Receive, payload: bytes) -> None:
        """The bytes of a payload are not changed."""
        assert list(await publisher.publish([new_message(payload=payload)])) == [Sent()]

        [only] = await received(1)
        assert only.payload == payload

    async def test_bytes_arrive_as_they_are_or_are_refused(self, publisher: Publisher, received: Receive) -> None:
        """A payload that is no text arrives as it is, where the broker carries it."""
        payload = bytes(range(256))

        [outcome, _] = await publisher.publish([new_message(payload=payload), new_message()])

        [first, *_] = await received(2 if self.carries_bytes else 1)
        if self.carries_bytes:
            assert outcome == Sent()
            assert first.payload == payload
        else:
            assert isinstance(outcome, Refused)
            assert first.payload == b'{"total": 7}'

    async def test_tombstone_arrives_or_is_refused(self, publisher: Publisher, received: Receive) -> None:
        """A message without a payload is not made one with an empty payload."""
        [outcome, _] = await publisher.publish([new_message(payload=None), new_message()])

        [first, *_] = await received(2 if self.carries_tombstones else 1)
        if self.carries_tombstones:
            assert outcome == Sent()
            assert first.payload is None
        else:
            assert isinstance(outcome, Refused)
            assert first.payload == b'{"total": 7}'

    @pytest.mark.parametrize(
        "headers",
        [{"note": "a\r\nid: forged"}, {"note\r\nid": "forged"}, {"": "unnamed"}],
        ids=["value", "name", "no name"],
    )
    async def test_headers_cannot_be_forged(
        self, publisher: Publisher, received: Receive, headers: dict[str, str]
    ) -> None:
        """A header with a line break, or without a name, arrives as it is or is refused."""
        strange, plain = new_message(headers=headers), new_message()

        [outcome, after] = await publisher.publish([strange, plain])

        assert after == Sent()
        if outcome == Sent():
            [first, _] = await received(2)
            assert first.headers == {"id": strange.id, "eventType": "OrderPlaced", **headers}
        else:
            assert isinstance(outcome, Refused)
            [first] = await received(1)
            assert first.id == plain.id

    async def test_repeated_message_has_the_same_id(self, publisher: Publisher, received: Receive) -> None:
        """A message that is published again is dropped by the broker, or is a second copy with the same id."""
        message, last = new_message(), new_message()
        assert list(await publisher.publish([message])) == [Sent()]

        [again] = await publisher.publish([message])
        await publisher.publish([last])

        assert type(again) is self.repeated
        arrived = await received(self.copies + 1)
        assert [each.id for each in arrived] == [message.id] * self.copies + [last.id]
