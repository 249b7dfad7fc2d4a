"""What operators did on the page, as a command lists it."""

from __future__ import annotations

import asyncio
import json

import pytest
from typer.testing import CliRunner, Result

from idempotency._cli.commands import app
from idempotency.stores.base import Action
from tests.kit.targets import Target, run_on

pytestmark = pytest.mark.stores("sqlite", "redis", "postgres")


def command(place: Target, *arguments: str) -> Result:
    """Run the command on a store."""
    names = [text for name, value in place.options.items() for text in (f"--{name}", value)]
    return CliRunner().invoke(app, ["audit", *arguments, "--store", place.url, *names])


def test_the_audit_is_listed_by_a_command(store_target: Target) -> None:
    """The newest first, each in one line, also in JSON."""
    asyncio.run(store_target.create())
    assert command(store_target).stderr == "no action is written down\n"
    one = Action(id="1" * 32, operator="ada", name="forget", thing="record 1f5a", reason="it is\ndone")
    two = Action(id="2" * 32, operator="eve", name="redrive", thing="message 7", reason="the broker is back")
    for each in (one, two):
        run_on(store_target, lambda store, each=each: store.write_down(each))
    run_on(store_target, lambda store: store.write_outcome(one.id, "forgotten"))

    last, first = command(store_target).stdout.splitlines()
    [only] = json.loads(command(store_target, "--limit", "1", "--json").stdout)

    assert last.split("\t")[:2] == [two.id, "not ended"]
    assert last.endswith("\toperator=eve\taction=redrive\tthing=message 7\treason=the broker is back\toutcome=-")
    assert first.split("\t")[:2] == [one.id, "ended"]
    assert first.endswith("\taction=forget\tthing=record 1f5a\treason=it is\\ndone\toutcome=forgotten")
    assert (only["id"], only["operator"], only["outcome"]) == (two.id, "eve", None)
