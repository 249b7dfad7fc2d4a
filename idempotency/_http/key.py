"""Read the idempotency key, and how long its sender wants to wait, from raw header pairs; send the key back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NoReturn
from urllib.parse import unquote_to_bytes

from idempotency._http.body import Message, Send
from idempotency.errors import KeyInvalidError

_STRING = rb'[ !#-\[\]-~]*+(?:\\["\\][ !#-\[\]-~]*+)*+'
_QUOTED = re.compile(rb'"(%b)"' % _STRING)

# Proxies, SDKs and people send such text unquoted. A comma is refused, because a proxy may have joined two field lines
# with it. A quote is refused, because a String with one quote is a damaged key and not another key.
_BARE = re.compile(rb"[!#-+\--~]++")

_ESCAPE = re.compile(rb'\\(["\\])')

# RFC 9651 sections 3.1.2 and 3.3. A Byte Sequence may lack its padding, as section 4.2.7 asks.
_PARAMETER = re.compile(
    rb";\x20*+[a-z*][a-z0-9_.*-]*+"
    rb"(?:="
    rb"(?:-?(?:[0-9]{1,12}\.[0-9]{1,3}|[0-9]{1,15})"  # Decimal, Integer
    rb'|"%b"'  # String
    rb"|[A-Za-z*][A-Za-z0-9!#$%%&'*+.^_`|~:/-]*+"  # Token
    rb"|:[A-Za-z0-9+/]*+={0,2}:"  # Byte Sequence
    rb"|\?[01]"  # Boolean
    rb"|@-?[0-9]{1,15}"  # Date
    rb'|%%"(?P<display>(?:[ !#$&-~]|%%[0-9a-f]{2})*+)"'  # Display String
    rb"))?" % _STRING
)

_WAIT_CAP = 2.0**31
"""RFC 9111 section 1.2.2: a number of seconds that is too large counts as this one."""

MAX_LENGTH = 255
"""Characters that a key may have."""

# A quote that is never closed takes the rest of its line: it means nothing, but is read in linear time.
_ELEMENT = re.compile(rb'(?:[^,"]|"(?:[^"\\]|\\.?)*+"?)++', re.DOTALL)
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_PREFERENCE = re.compile(
    rb'[ \t]*+(%b)[ \t]*+(?:=[ \t]*+(?:"([^"\\]*+)"|(%b))[ \t]*+)?(?:;.*)?' % (_TOKEN, _TOKEN), re.DOTALL
)


def read_key(values: Sequence[bytes], *, strict: bool = False) -> str | None:
    r"""Read the key from the values of its field, or return None if there is no such field.

    A value is a String of RFC 9651 (draft section 2.1): its text with ``\"`` and ``\\`` unescaped is the key, its
    parameters are checked and ignored. Unless ``strict``, bare text is a key too: visible ASCII without white
    space, commas and double quotes, as it is, so that ``k`` and ``"k"`` are one key and ``k;v=1`` is another.

    Raises :class:`~idempotency.errors.KeyInvalidError` for anything else, for two field lines, an empty key, and a key
    of more than 255 characters. The message never contains the key.
    """
    if not values:
        return None
    if len(values) > 1:
        raise KeyInvalidError("The key was sent in more than one field line.")
    value = values[0].strip(b" \t")
    if value.startswith(b'"'):
        key = _read_string(value)
    elif not strict and _BARE.fullmatch(value):
        key = value.decode("ascii")
    else:
        _refuse(value, strict)
    if not key:
        raise KeyInvalidError("The key is empty.")
    if len(key) > MAX_LENGTH:
        raise KeyInvalidError(f"The key has {len(key)} characters; at most {MAX_LENGTH} are allowed.")
    return key


def _read_string(value: bytes) -> str:
    string = _QUOTED.match(value)
    if string is None:
        raise KeyInvalidError(
            'The quoted key is malformed: it needs a closing quote, printable ASCII, and no escapes but \\" and \\\\.'
        )
    position = string.end()
    while position < len(value):
        parameter = _PARAMETER.match(value, position)
        if parameter is None or not _is_utf8(parameter["display"]):
            if value[position:].lstrip(b" ").startswith(b","):
                raise KeyInvalidError("The field holds a list; send one key.")
            raise KeyInvalidError("The quoted key is followed by something other than well-formed parameters.")
        position = parameter.end()
    text: bytes = string[1]
    if b"\\" in text:
        text = _ESCAPE.sub(rb"\1", text)
    return text.decode("ascii")


def _is_utf8(display: bytes | None) -> bool:
    if display is None:
        return True
    try:
        unquote_to_bytes(display).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _refuse(value: bytes, strict: bool) -> NoReturn:
    if not value:
        reason = "The key is empty."
    elif strict:
        reason = "The key must be a quoted String (RFC 9651 section 3.3.3)."
    elif b"," in value:
        reason = "The field holds a list, or an unquoted key with a comma; send one key, quoted if it has a comma."
    elif b'"' in value:
        reason = "The unquoted key contains a double quote."
    elif not value.isascii():
        reason = "The key contains bytes that are not ASCII."
    else:
        reason = "The unquoted key contains white space or control characters."
    raise KeyInvalidError(reason)


def key_to_echo(values: Sequence[bytes], *, strict: bool) -> bytes | None:
    """Return the key as it was sent, from the values of its field; None if it cannot be read."""
    try:
        return None if read_key(values, strict=strict) is None else values[0].strip(b" \t")
    except KeyInvalidError:
        return None


def send_with_key(send: Send, values: Sequence[bytes], name: bytes, *, strict: bool) -> Send:
    """Return a ``send`` that puts the key, as it was sent, into each response; ``send`` if the key cannot be read.

    ``values``: those of the field ``name`` of the request. A field of this name that the application sends is replaced:
    it may be recorded, and the retry be quoted otherwise.
    """
    sent = key_to_echo(values, strict=strict)
    if sent is None:
        return send

    async def send_key(message: Message) -> None:
        if message["type"] == "http.response.start":
            others = [pair for pair in message.get("headers", ()) if pair[0].lower() != name]
            message = {**message, "headers": [*others, (name, sent)]}
        await send(message)

    return send_key


def read_prefer_wait(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """Read the seconds of ``Prefer: wait=n`` (RFC 7240 section 4.3), or return None if no valid field asks for them.

    Of several ``wait`` preferences the first counts (section 2), even if it is malformed and therefore ignored.
    Numbers over 2**31 count as 2**31.
    """
    for field, content in headers:
        if field.lower() != b"prefer":
            continue
        for element in _ELEMENT.findall(content):
            preference = _PREFERENCE.fullmatch(element)
            if preference is not None and preference[1].lower() == b"wait":
                seconds: bytes = preference[2] or preference[3] or b""
                return min(float(seconds), _WAIT_CAP) if seconds.isdigit() else None
    return None
