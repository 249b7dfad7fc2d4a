"""The command line on a store whose records are encrypted."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from idempotency import open_store
from idempotency._cli.commands import app
from idempotency._http.codec import decode_response
from idempotency._rules import Claim, State
from idempotency.stores.encryption import Encryption

SCOPE = "http:1:anonymous"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/records.db"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(Encryption.new_key() + "\n")
    return file


def claimed() -> Claim:
    return Claim(scope=SCOPE, key="order-7", fingerprint=b"f" * 32, lease=30.0, ttl=60.0)


def on_store(url: str, key_file: Path, work: Any, **options: Any) -> Any:
    """Run ``work`` on a store with the keys of the file."""

    async def run() -> Any:
        store = open_store(url, encryption=Encryption.from_file(key_file), **options)
        try:
            return await work(store)
        finally:
            await store.aclose()

    return asyncio.run(run())


@pytest.fixture
def held(url: str, key_file: Path) -> Claim:
    """A record whose outcome is unknown."""
    claim = claimed()

    async def hold(store: Any) -> None:
        await store.claim(claim)
        await store.complete(claim, None, State.UNKNOWN)

    on_store(url, key_file, hold)
    return claim


def command(url: str, *arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app, [*arguments, "--store", url], **options)


@pytest.mark.parametrize("by", ["option", "environment"])
def test_an_operator_with_the_keys_sees_scopes_and_keys(url, key_file, held, by):
    given = ["--encryption-key-file", str(key_file)] if by == "option" else []
    environment = {"IDEMPOTENCY_ENCRYPTION_KEY_FILE": str(key_file)} if by == "environment" else {}

    for arguments in (["inspect", "order-7"], ["list"]):
        [entry] = json.loads(command(url, *arguments, "--json", *given, env=environment).stdout)
        assert (entry["key"], entry["scope"]) == ("order-7", SCOPE)


def test_an_operator_without_the_keys_sees_which_one_is_needed(url, key_file, held):
    [needed] = Encryption.from_file(key_file).key_ids

    [entry] = json.loads(command(url, "list", "--json").stdout)

    assert entry["key"] == entry["scope"] == f"(encrypted: give the key {needed})"
    assert entry["id"] == held.id.hex()


def test_a_response_is_resolved_with_only_if_it_can_be_encrypted(url, key_file, held):
    refused = command(url, "resolve", held.id.hex(), "done", "--status", "201")
    assert (refused.exit_code, "give --encryption-key-file" in refused.stderr) == (2, True)

    keys = ["--encryption-key-file", str(key_file)]
    assert command(url, "resolve", held.id.hex(), "done", "--status", "201", *keys).exit_code == 0

    record = on_store(url, key_file, lambda store: store.claim(claimed()))
    assert decode_response(record.result).status == 201


def test_a_response_is_resolved_with_where_scopes_are_digests(url, key_file):
    """The kind of the record stays readable, which says that it is one of a request."""
    claim = claimed()

    async def hold(store: Any) -> None:
        await store.claim(claim)
        await store.complete(claim, None, State.UNKNOWN)

    on_store(url, key_file, hold, digest_names=True)
    keys = ["--encryption-key-file", str(key_file)]

    [entry] = json.loads(command(url, "inspect", "order-7", "--json", *keys).stdout)
    assert entry["key"].startswith("hmac-sha256:")
    assert command(url, "resolve", claim.id.hex(), "done", "--status", "201", *keys).exit_code == 0


def test_a_response_is_not_written_in_plain_text_beside_keyed_digests(url, key_file):
    """The digests show that the store encrypts, though not with which key."""
    claim = claimed()

    async def hold(store: Any) -> None:
        await store.claim(claim)
        await store.complete(claim, None, State.UNKNOWN)

    on_store(url, key_file, hold, digest_names=True)

    refused = command(url, "resolve", claim.id.hex(), "done", "--status", "201")

    assert (refused.exit_code, "give --encryption-key-file" in refused.stderr) == (2, True)
    assert "records that are encrypted with a key that was not given: 1 or more" in command(url, "doctor").stdout


def test_a_key_that_cannot_be_searched_for_is_not_told_as_absent(url, key_file, held):
    """Without the keys, or with another one, an operator reads why nothing is found."""
    other = key_file.with_name("other")
    other.write_text(Encryption.new_key())
    besides = "error: there is no such record, besides those that need another key in --encryption-key-file\n"

    assert command(url, "inspect", "order-7").stderr == besides
    assert command(url, "inspect", "order-7", "--encryption-key-file", str(other)).stderr == besides
    known = command(url, "inspect", "order-8", "--encryption-key-file", str(key_file))
    assert known.stderr == "error: there is no such record\n"


@pytest.mark.parametrize("arguments", [("resolve", "release"), ("forget", "--yes")], ids=["resolve", "forget"])
def test_counts_that_cannot_be_found_without_the_keys_are_named(url, key_file, held, arguments):
    name, *rest = arguments

    done = command(url, name, held.id.hex(), *rest)

    assert (done.exit_code, done.stderr) == (
        0,
        "note: the counts of its deliveries, if it is a message, remain until they expire: its names are encrypted\n",
    )


def test_a_file_of_keys_that_cannot_be_read_is_one_line(url, tmp_path, held):
    result = command(url, "list", "--encryption-key-file", str(tmp_path / "missing"))

    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "cannot be read" in result.stderr
