"""Exceptions as results: what of them is data comes back, under the name of their class."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idempotency import Policy, idempotent
from idempotency._results.codec import encode_failure, results_of
from idempotency.errors import ConfigurationError, RecordedFailureError, UnreadableError
from idempotency.stores.memory import MemoryStore


class CardDeclinedError(Exception):
    def __init__(self, message: str, code: str, details: Any = None) -> None:
        super().__init__(message, code)
        self.code = code
        self.details = details
        self._secret = "internal"

    def __str__(self) -> str:
        return f"declined: {self.code}"


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def function() -> int:
    return 1


def read(data: bytes) -> RecordedFailureError:
    """Read a recorded failure."""
    with pytest.raises(RecordedFailureError) as raised:
        results_of(function).decode(data)
    return raised.value


def come_back(error: BaseException) -> RecordedFailureError:
    return read(encode_failure(error))


def test_the_data_of_an_exception_comes_back() -> None:
    """Type, message, arguments and public attributes; the text of the error itself names the type only."""
    found = come_back(CardDeclinedError("no", "insufficient_funds", {"retry": [1, None, 2.5, True]}))

    assert found.type == f"{__name__}.CardDeclinedError"
    assert found.message == "declined: insufficient_funds"
    assert found.arguments == ("no", "insufficient_funds")
    assert found.attributes == {"code": "insufficient_funds", "details": {"retry": [1, None, 2.5, True]}}
    assert (
        str(found)
        == f"The operation failed with {__name__}.CardDeclinedError; the failure is recorded and not tried again."
    )


@pytest.mark.parametrize(
    "value",
    [Decimal(1), datetime.now(UTC), b"x", (1,), {1: 2}, {"a": object()}, float("nan"), "x" * 16384, [[["x"] * 9000]]],
    ids=["decimal", "datetime", "bytes", "tuple", "key", "object", "nan", "long", "large"],
)
def test_what_is_no_data_is_omitted(value: Any) -> None:
    """An attribute, or arguments, of other types or too large: the rest of the exception is recorded."""
    error = CardDeclinedError("no", "code", value)
    error.args = ("no", value)

    found = come_back(error)

    assert (found.message, found.arguments, found.attributes) == ("declined: code", (), {"code": "code"})
    assert len(encode_failure(error)) < 17000


def test_a_value_that_contains_itself_is_omitted() -> None:
    """It has no end."""
    endless: list[Any] = []
    endless.append(endless)

    assert come_back(CardDeclinedError("no", "code", endless)).attributes == {"code": "code"}


def test_the_parts_of_an_exception_share_the_limit() -> None:
    """What comes first is recorded: the message, the arguments, then the attributes in their order."""
    error = ValueError("x" * 9000)
    error.first, error.second, error.third = "y" * 9000, "z" * 7000, 1  # type: ignore[attr-defined]

    found = come_back(error)

    assert (found.message, found.arguments, list(found.attributes)) == ("x" * 9000, (), ["second", "third"])


def test_an_exception_whose_own_code_fails_is_recorded_by_its_name() -> None:
    """The end of the operation has to be recorded."""
    found = come_back(MuteError("a"))

    assert (found.type, found.message, found.arguments) == (f"{__name__}.MuteError", "", ())


DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=100), st.lists(DATA, max_size=3), DATA)
def test_any_data_comes_back(text: str, arguments: list[Any], details: Any) -> None:
    """Equal and of the same types, whatever is in it."""
    error = CardDeclinedError("", text, details)
    error.args = tuple(arguments)

    found = come_back(error)

    assert found.message == f"declined: {text}"
    assert repr((found.arguments, found.attributes)) == repr((tuple(arguments), {"code": text, "details": details}))


def test_a_recorded_failure_can_be_pickled() -> None:
    """It may have to cross to another process."""
    found = pickle.loads(pickle.dumps(come_back(CardDeclinedError("no", "code", [1]))))

    assert (found.message, found.attributes) == ("declined: code", {"code": "code", "details": [1]})


def test_the_bytes_of_a_failure_are_fixed() -> None:
    """Golden bytes: version, kind, JSON."""
    assert encode_failure(KeyError("order")) == (
        b'\x01f{"type":"KeyError","attributes":{},"message":"\'order\'","arguments":["order"]}'
    )
    assert encode_failure(ConfigurationError()) == (
        b'\x01f{"type":"idempotency.errors.ConfigurationError","attributes":{},"message":"","arguments":[]}'
    )


def test_a_failure_of_an_earlier_release_is_read() -> None:
    """Golden bytes: it has the name of the class only."""
    found = read(b"\x01eshop.CardDeclined")

    assert (found.type, found.message, found.arguments, dict(found.attributes)) == ("shop.CardDeclined", "", (), {})


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b"1", b'{"type":"A"}', b'{"attributes":{}}', b"\xff"])
def test_a_damaged_failure_is_unreadable(body: bytes) -> None:
    """It is never run again for that."""
    with pytest.raises(UnreadableError):
        results_of(function).decode(b"\x01f" + body)


def test_a_later_call_can_branch_on_a_stored_failure() -> None:
    """The first call raises the exception, each later one what is recorded of it, without the class."""

    @idempotent(MemoryStore(), key=lambda: "k", policy=Policy(outcomes={CardDeclinedError: "store"}))
    def charge() -> int:
        raise CardDeclinedError("no", "insufficient_funds")

    with pytest.raises(CardDeclinedError):
        charge()
    with pytest.raises(RecordedFailureError) as again:
        charge()
    assert again.value.type.endswith("CardDeclinedError")
    assert again.value.attributes["code"] == "insufficient_funds"
