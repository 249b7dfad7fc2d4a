"""Datetimes and times as results: what comes back has the same digits, ``fold`` and zone."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, timezone, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from idempotency._results.codec import Results, results_of
from idempotency.errors import UnreadableError

BERLIN = ZoneInfo("Europe/Berlin")
CEST = timezone(timedelta(hours=2), "CEST")
TWICE = datetime(2026, 10, 25, 2, 30)
"""A local time that Berlin has twice, with ``fold`` 0 and 1."""


class OtherZone(tzinfo):
    """A zone of another library, which is equal to itself only."""

    def utcoffset(self, when: datetime | None, /) -> timedelta:
        return timedelta(hours=1)

    def dst(self, when: datetime | None, /) -> timedelta:
        return timedelta(0)

    def tzname(self, when: datetime | None, /) -> str:
        return "UTC+01:00"


class LocalDatetime(datetime):
    pass


class Event(BaseModel):
    at: datetime
    also: list[datetime | time] = []
    by_name: dict[str, Event] = {}


@dataclass
class Shift:
    start: datetime
    end: time
    event: Event | None = None


def results(annotation: Any) -> Results:
    """Return how results of this annotation are recorded."""

    def function() -> None: ...

    function.__annotations__["return"] = annotation
    return results_of(function)


def come_back(annotation: Any, value: Any) -> Any:
    """Record and read a value."""
    return results(annotation).decode(results(annotation).encode(value))


def identity(value: Any) -> tuple[Any, ...]:
    """Return what makes a datetime or time the same as another one."""
    zone = value.tzinfo
    known = zone.key if isinstance(zone, ZoneInfo) else (zone, value.tzname())
    return type(value), value.replace(tzinfo=None), value.fold, known, value.utcoffset()


OFFSETS = st.timedeltas(min_value=timedelta(hours=-23), max_value=timedelta(hours=23))
ZONES = st.one_of(
    st.none(),
    st.just(UTC),
    st.builds(timezone, OFFSETS),
    st.builds(timezone, OFFSETS, st.text(max_size=5)),
    st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC", "Asia/Kathmandu"]).map(
        ZoneInfo
    ),
)
DATETIMES = st.datetimes(timezones=ZONES, allow_imaginary=True)
FOLDED = st.builds(lambda value, fold: value.replace(fold=fold), DATETIMES, st.sampled_from([0, 1]))
TIMES = st.builds(
    lambda value, zone, fold: value.replace(tzinfo=zone, fold=fold), st.times(), ZONES, st.sampled_from([0, 1])
)


@settings(max_examples=300, deadline=None)
@given(FOLDED)
def test_any_datetime_comes_back_the_same(value: datetime) -> None:
    """Digits, fold, zone and its name are those that went in."""
    assert identity(come_back(datetime, value)) == identity(value)


@settings(max_examples=300, deadline=None)
@given(TIMES)
def test_any_time_comes_back_the_same(value: time) -> None:
    """The same holds for times, whose zone may have no offset without a day."""
    assert identity(come_back(time, value)) == identity(value)


@settings(max_examples=200, deadline=None)
@given(FOLDED, st.lists(FOLDED | TIMES, max_size=3), FOLDED)
def test_the_times_of_a_model_come_back_the_same(at: datetime, also: list[Any], other: datetime) -> None:
    """Pydantic itself reads each zone as a fixed offset, and no fold; this holds for models in models too."""
    event = Event(at=at, also=also, by_name={"other": Event(at=other)})

    found = come_back(Event, event)

    assert found == event
    assert [identity(each) for each in found.also] == [identity(each) for each in also]
    assert identity(found.at) == identity(at)
    assert identity(found.by_name["other"].at) == identity(other)


@settings(max_examples=100, deadline=None)
@given(FOLDED, TIMES, FOLDED)
def test_the_times_within_other_results_come_back_the_same(start: datetime, end: time, at: datetime) -> None:
    """In dataclasses, lists, dicts and tuples, and next to None."""
    shift = Shift(start, end, Event(at=at))

    [(found, nothing)] = come_back(dict[str, list[tuple[Shift | None, Shift | None]]], {"a": [(shift, None)]})["a"]

    assert (found, nothing) == (shift, None)
    assert list(map(identity, [found.start, found.end, found.event.at])) == list(map(identity, [start, end, at]))


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (TWICE, b'"2026-10-25T02:30:00"'),
        (TWICE.replace(tzinfo=UTC), b'"2026-10-25T02:30:00+00:00"'),
        (TWICE.replace(tzinfo=timezone(timedelta(hours=-5))), b'"2026-10-25T02:30:00-05:00"'),
        (TWICE.replace(fold=1), b'{"local":"2026-10-25T02:30:00","fold":1}'),
        (TWICE.replace(tzinfo=BERLIN), b'{"local":"2026-10-25T02:30:00","fold":0,"zone":"Europe/Berlin"}'),
        (TWICE.replace(tzinfo=CEST), b'{"local":"2026-10-25T02:30:00","fold":0,"offset":[0,7200,0],"name":"CEST"}'),
        (TWICE.replace(tzinfo=UTC, fold=1), b'{"local":"2026-10-25T02:30:00","fold":1,"offset":[0,0,0]}'),
        (time(2, 30), b'"02:30:00"'),
        (time(2, 30, tzinfo=BERLIN), b'{"local":"02:30:00","fold":0,"zone":"Europe/Berlin"}'),
        (Event(at=TWICE.replace(tzinfo=UTC)), b'{"at":"2026-10-25T02:30:00Z","also":[],"by_name":{}}'),
        (
            Event(at=TWICE.replace(tzinfo=BERLIN), also=[time(1)]),
            b'{"$model":{"at":"2026-10-25T02:30:00+02:00","also":["01:00:00"],"by_name":{}},"$times":['
            b'{"local":"2026-10-25T02:30:00","fold":0,"zone":"Europe/Berlin"},null]}',
        ),
    ],
)
def test_the_bytes_of_a_time_are_fixed(value: Any, stored: bytes) -> None:
    """Golden bytes: a plain or UTC datetime is a text, as it always was; what a text does not say is in an object."""
    assert results(type(value)).encode(value) == b"\x01j" + stored
    assert results(type(value)).decode(b"\x01j" + stored) == value


def test_an_older_record_is_read() -> None:
    """Earlier releases wrote the offset of every zone, and no fold."""
    stored = b'\x01j"2026-10-25T02:30:00+01:00"'

    assert results(datetime).decode(stored) == TWICE.replace(tzinfo=timezone(timedelta(hours=1)))
    assert results(Event).decode(b'\x01j{"at":"2026-10-25T02:30:00+01:00"}').at.utcoffset() == timedelta(hours=1)


def test_a_time_that_pydantic_has_read_comes_back() -> None:
    """Its zone is a class of pydantic, and equal to the timezone that comes back."""
    at = TypeAdapter(datetime).validate_json('"2026-10-25T02:30:00+02:00"')
    assert type(at.tzinfo) is not timezone

    for found in (
        come_back(datetime, at),
        come_back(Shift, Shift(at, time(1))).start,
        come_back(Event, Event(at=at)).at,
    ):
        assert (found, found.tzinfo) == (at, timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    "value",
    [
        TWICE.replace(tzinfo=OtherZone()),
        time(2, 30, tzinfo=OtherZone()),
        LocalDatetime(2026, 1, 1),
        Event(at=TWICE.replace(tzinfo=OtherZone())),
        Shift(TWICE.replace(tzinfo=OtherZone()), time(1)),
        Event(at=LocalDatetime(2026, 1, 1)),
    ],
)
def test_a_zone_of_another_library_is_not_recorded(value: Any) -> None:
    """Zones such as those of pytz and dateutil would come back as others; subclasses would come back as their base."""
    annotation = datetime if isinstance(value, datetime) else type(value)

    with pytest.raises((TypeError, ValueError)):
        results(annotation).encode(value)


def test_a_zone_without_a_key_is_not_recorded() -> None:
    """A ZoneInfo that was read from a file cannot be found again."""
    file = io.BytesIO(b"TZif" + bytes(16) + struct.pack(">6LlBB", 0, 0, 0, 0, 1, 4, 3600, 0, 0) + b"CET\0")

    with pytest.raises(ValueError, match="key"):
        results(datetime).encode(TWICE.replace(tzinfo=ZoneInfo.from_file(file)))


@pytest.mark.parametrize(
    "stored",
    [
        b'{"local":"2026-10-25T02:30:00","fold":0,"zone":"No/Where"}',
        b'{"local":"2026-10-25T02:30:00","fold":0,"zone":"../../etc/passwd"}',
        b'{"local":"2026-10-25T02:30:00","fold":2}',
        b'{"local":"2026-10-25T02:30:00"}',
        b'{"fold":0}',
        b"{}",
        b"[]",
        b"1",
    ],
)
def test_another_form_of_a_time_is_unreadable(stored: bytes) -> None:
    """A zone that is not known here, or a form that we do not write, is an UnreadableError."""
    with pytest.raises(UnreadableError):
        results(datetime).decode(b"\x01j" + stored)
