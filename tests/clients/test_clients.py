"""What real clients do with our answers by their own rules: each row of ``docs/clients.md``."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.clients.rig import CLIENTS, CUT, DIRECT, IN_VAIN, Call, Got, require, run_clients
from tests.kit.asgi_servers import Bench, Live
from tests.kit.targets import Target

pytestmark = [pytest.mark.alone, pytest.mark.processes]

Answers = dict[Call, Got]

UVICORN, HYPERCORN = "uvicorn-httptools", "hypercorn"
EACH_CLIENT = pytest.mark.parametrize("client", CLIENTS)
SOON = 15.0
"""Seconds after its first request in which a client has its answer."""


@pytest.fixture(scope="module")
def answers(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What every client got."""
    redis = Target("redis", redis_url)
    benches = {
        UVICORN: Bench(tmp_path_factory.mktemp(UVICORN), Target("memory", "memory://")),
        HYPERCORN: Bench(tmp_path_factory.mktemp(HYPERCORN), redis),
    }
    with ExitStack() as stack:
        lives = {
            kind: stack.enter_context(Live(kind, 1, bench, "tests.clients.application:app"))
            for kind, bench in benches.items()
        }
        answers = run_clients(lives, {UVICORN: (*CUT, *IN_VAIN, *DIRECT), HYPERCORN: CUT})
    redis.forget()
    assert not [complaint for live in lives.values() for complaint in live.complaints()]
    for call, got in answers.items():
        name = f"{call.server:18} {call.client:26} {call.situation:12}"
        print(f"{name} {got.seconds:5.2f} s {got.statuses} {got.error or ''}")
    return answers


@EACH_CLIENT
@pytest.mark.parametrize("situation", CUT)
@pytest.mark.parametrize("server", [UVICORN, HYPERCORN])
def test_a_cut_connection_costs_little_time(server: str, situation: str, client: str, answers: Answers) -> None:
    """A client whose connection was cut has the result of the one run soon, by the default policy."""
    require(client)
    got = answers[Call(server, client, situation)]

    assert [got.id] == got.effects
    assert got.seconds < SOON


@EACH_CLIENT
def test_a_retry_in_progress_has_the_result(client: str, answers: Answers) -> None:
    """A client that is answered 409 in-progress tries again, and has the result of the one run."""
    require(client)
    got = answers[Call(UVICORN, client, "running")]

    assert 409 in got.statuses
    assert [got.id] == got.effects


@EACH_CLIENT
@pytest.mark.parametrize("situation", IN_VAIN)
def test_a_retry_in_vain_is_not_repeated(situation: str, client: str, answers: Answers) -> None:
    """A client that is answered in vain sends no third request."""
    require(client)
    got = answers[Call(UVICORN, client, situation)]

    assert got.requests == 2
    assert got.statuses[1:] == [IN_VAIN[situation]]
    assert len(got.effects) == 1


@EACH_CLIENT
def test_a_reused_key_is_not_repeated(client: str, answers: Answers) -> None:
    """A client that is answered 422 for a key of another request sends no other one."""
    require(client)
    got = answers[Call(UVICORN, client, "reused")]

    assert got.statuses == [201, 422]
    assert len(got.effects) == 1


@EACH_CLIENT
def test_an_unavailable_store_is_asked_again(client: str, answers: Answers) -> None:
    """A client that is answered 503 tries again, and has its result soon."""
    require(client)
    got = answers[Call(UVICORN, client, "unavailable")]

    assert got.statuses == [503, 201]
    assert [got.id] == got.effects
    assert got.seconds < SOON


def test_a_problem_document_is_a_result_for_stripe_for_node(answers: Answers) -> None:
    """This client takes a problem document for a result without an id, which is why there is a profile for it."""
    require("stripe for Node")
    got = answers[Call(UVICORN, "stripe for Node", "reused")]

    assert (got.error, got.id) == (None, None)
