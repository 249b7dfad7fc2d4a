"""Write datetimes and times as JSON, with their zone and ``fold``, and read them.

A text is ISO 8601, where that says everything: without a zone, or with an offset. The other form is an object:
``local`` (ISO 8601 without a zone), ``fold``, and either ``zone``, the key of a ``ZoneInfo``, or ``offset`` (days,
seconds, microseconds) and perhaps ``name``, of a ``timezone``.
"""

from __future__ import annotations

from datetime import datetime, time, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo


def write_time(value: datetime | time) -> Any:
    """Return the JSON of a datetime or time.

    Raises ValueError for a zone that would not come back: a ``ZoneInfo`` without a key, or one of another library,
    unless it is equal to a ``timezone``, as the offsets of pydantic are. Then it comes back as that.
    """
    kind = type(value)
    offset = value.utcoffset()
    if offset is not None and type(value.tzinfo) is not timezone and value.tzinfo == timezone(offset):
        value = value.replace(tzinfo=timezone(offset))
    text = value.isoformat()
    if same_time(kind.fromisoformat(text), value):
        return text
    local = value.replace(tzinfo=None, fold=0).isoformat()
    found = {"local": local, "fold": value.fold, **_zone(value)}
    if not same_time(read_time(kind, found), value):
        raise ValueError(f"a zone of {type(value.tzinfo).__module__} cannot be recorded")
    return found


def read_time(kind: type[datetime] | type[time], found: Any) -> datetime | time:
    """Read what :func:`write_time` wrote; any exception means that it did not write this."""
    if type(found) is str:
        return kind.fromisoformat(found)
    zone: Any = None
    if "zone" in found:
        zone = ZoneInfo(found["zone"])
    elif "offset" in found:
        zone = timezone(timedelta(*found["offset"]), *([found["name"]] if "name" in found else []))
    return kind.fromisoformat(found["local"]).replace(fold=found["fold"], tzinfo=zone)


def same_time(first: datetime | time, second: datetime | time) -> bool:
    """Return whether two datetimes or times have the same digits, ``fold`` and zone. ``==`` compares moments only."""
    if first.replace(tzinfo=None) != second.replace(tzinfo=None) or first.fold != second.fold:
        return False
    zones = (first.tzinfo, second.tzinfo)
    if any(type(zone) is ZoneInfo for zone in zones):
        # Two objects of one zone are not equal, where one was made without the cache.
        keys = {zone.key if type(zone) is ZoneInfo else None for zone in zones}
        return len(keys) == 1 and None not in keys and first.utcoffset() == second.utcoffset()
    # A timezone is not compared by its name.
    named = all(type(zone) is timezone for zone in zones)
    return first.tzinfo == second.tzinfo and (not named or first.tzname() == second.tzname())


def _zone(value: datetime | time) -> dict[str, Any]:
    zone = value.tzinfo
    if zone is None:
        return {}
    if type(zone) is ZoneInfo:
        if zone.key is None:
            raise ValueError("a ZoneInfo without a key cannot be recorded")
        return {"zone": zone.key}
    offset = value.utcoffset()
    if offset is None:
        raise ValueError(f"a zone of {type(zone).__module__} without an offset cannot be recorded")
    named = type(zone) is timezone and zone.tzname(None) != timezone(offset).tzname(None)
    written = {"offset": [offset.days, offset.seconds, offset.microseconds]}
    return {**written, "name": zone.tzname(None)} if named else written
