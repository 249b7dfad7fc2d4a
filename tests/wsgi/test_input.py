"""The body of a request, from ``wsgi.input``: read once, compared, and given to the application from its start."""

from __future__ import annotations

import io
import tempfile
from typing import Any

import pytest

from idempotency import Policy
from tests.kit.wsgi_calls import Effects, call, protect


class Input(io.BytesIO):
    """A body of which ``past`` says how much was read beyond ``length``; ``error`` is raised at its end."""

    def __init__(self, data: bytes, error: BaseException | None = None) -> None:
        super().__init__(data)
        self.error = error
        self.asked = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.asked += 1
        data = super().read(size)
        if not data and self.error is not None:
            raise self.error
        return data


@pytest.mark.parametrize("size", [0, 1, 1 << 18, (1 << 20) + 1, 3_500_000])
def test_every_byte_is_compared_and_given_back(size: int) -> None:
    """Of a body in memory and of one on disk; a body whose last byte differs is another request."""
    app = Effects()
    protected = protect(app)
    body = bytes(size)

    answers = [call(protected, key="k", body=each) for each in (body, body, body[:-1] + b"x")]

    assert app.bodies == [body]
    assert answers[1].replayed
    assert answers[2].code == "key-reused"


@pytest.mark.parametrize("length", ["4", "0" * 20 + "4"])
def test_a_body_ends_where_its_length_says(length: str) -> None:
    """What follows in the input belongs to the next request of the connection."""
    app = Effects()
    source = Input(b"bodyGET / HTTP/1.1")

    call(protect(app), key="k", CONTENT_LENGTH=length, **{"wsgi.input": source})

    assert app.bodies == [b"body"]
    assert source.tell() == 4


@pytest.mark.parametrize("length", [None, ""])
def test_a_chunked_body_is_read_to_its_end_where_the_server_gives_one(length: str | None) -> None:
    """Without a length, but with wsgi.input_terminated, the application gets the body and its length."""
    app = Effects()
    protected = protect(app)
    chunked = {"CONTENT_LENGTH": length, "HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}

    first = call(protected, key="k", body=b"body", **chunked)
    other = call(protected, key="k", body=b"more", **chunked)

    assert (first.status, app.bodies) == (201, [b"body"])
    assert other.code == "key-reused"


@pytest.mark.parametrize("length", [None, "", "four", "-4", "\u00b2"])
def test_a_body_whose_end_is_not_known_is_refused(length: str | None) -> None:
    """It could neither be compared nor read: 400, and nothing runs. Without a sign of a body there is none."""
    app = Effects()
    protected = protect(app)

    refused = call(protected, key="k", body=b"body", CONTENT_LENGTH=length, HTTP_TRANSFER_ENCODING="chunked")

    assert (refused.status, refused.code, app.runs) == (400, "body-invalid", 0)
    if not length:
        assert call(protected, key="k", CONTENT_LENGTH=length).status == 201


@pytest.mark.parametrize("sent", [b"", b"ab", bytes(2_000_000)])
def test_a_client_that_leaves_while_it_sends_starts_nothing(sent: bytes) -> None:
    """A body that is shorter than its length is not complete: nothing runs, and the key is free."""
    app = Effects()
    protected = protect(app)

    assert call(protected, key="k", body=sent, CONTENT_LENGTH=str(len(sent) + 1)).status == 400
    assert app.runs == 0
    assert call(protected, key="k", body=b"whole").status == 201


def test_an_error_of_the_input_is_raised_to_the_server() -> None:
    """The server knows its connection: nothing runs, and nothing is claimed."""
    app = Effects()
    protected = protect(app)

    with pytest.raises(ConnectionResetError):
        call(protected, key="k", CONTENT_LENGTH="4", **{"wsgi.input": Input(b"ab", ConnectionResetError())})

    assert app.runs == 0
    assert call(protected, key="k", body=b"whole").status == 201


def test_a_body_that_is_too_large_is_refused_before_it_is_read() -> None:
    """By its length, and where there is none, as soon as it is past the limit; without a key there is no limit."""
    app = Effects()
    protected = protect(app, policy=Policy(max_request=10))
    source = Input(b"x" * 11)

    announced = call(protected, key="k", CONTENT_LENGTH="11", **{"wsgi.input": source})
    endless = call(protected, key="k", body=b"x" * 11, CONTENT_LENGTH=None, **{"wsgi.input_terminated": True})

    assert (announced.code, endless.code, source.asked) == ("request-too-large", "request-too-large", 0)
    assert call(protected, body=b"x" * 11).status == 201
    assert call(protected, key="k", body=b"x" * 10).status == 201


@pytest.mark.parametrize("ending", ["complete", "replayed", "reused", "raises", "leaves", "fingerprint", "unprotected"])
def test_a_body_on_disk_is_removed(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the request ends, its temporary file is closed."""
    files: list[Any] = []
    make = tempfile.TemporaryFile

    def noted(*args: Any, **kwargs: Any) -> Any:
        files.append(make(*args, **kwargs))
        return files[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)

    def fail(environ: Any, *_: Any) -> Any:
        assert environ["wsgi.input"].read(5) == b"\0" * 5
        raise LookupError

    large = bytes(2_000_000)
    app = Effects(fail if ending == "raises" else None)
    policy = Policy(fingerprint=fail) if ending == "fingerprint" else Policy(on_store_error="fail_open")
    protected = protect(app, policy=policy)
    if ending == "unprotected":
        monkeypatch.setattr(protected._runner, "claim", _unavailable)
    if ending in ("replayed", "reused"):
        call(protected, key="k", body=large if ending == "replayed" else b"")
    length = str(len(large) + (ending == "leaves"))

    if ending in ("raises", "fingerprint"):
        with pytest.raises(LookupError):
            call(protected, key="k", body=large)
    else:
        call(protected, key="k", body=large, CONTENT_LENGTH=length)

    assert files
    assert all(each.closed for each in files)


def _unavailable(*_: object) -> Any:
    from idempotency.errors import StoreError

    raise StoreError("away")
