"""Concurrent duplicates on real servers."""

from __future__ import annotations

import asyncio
import time

from tests.kit.asgi_servers import EACH, EVERY, LEASE, Live, new_key, over, post, post_alone, problem, same, until

MANY = 200


@over(EVERY)
async def test_duplicates_of_a_running_request_are_told_so(live: Live) -> None:
    """Of 200 concurrent requests one runs, 199 get 409, and a later retry gets the one's answer."""
    key = new_key()

    tasks = [asyncio.create_task(post_alone(live, "/order", key, gate=key)) for _ in range(MANY)]
    await until(lambda: sum(task.done() for task in tasks) >= MANY - 1, "199 answers")
    live.bench.open_gate(key)
    answers = await asyncio.gather(*tasks)
    retry = await post_alone(live, "/order", key)

    [first] = [answer for answer in answers if answer.status_code == 201]
    for answer in answers:
        if answer is not first:
            problem(answer, 409, "in-progress")
            assert 1 <= int(answer.headers["retry-after"]) <= 5
    same(first, retry)
    assert len(live.bench.lines(effect=key)) == 1


@over(EVERY)
async def test_waiting_duplicates_get_the_answer(live: Live) -> None:
    """With a waiting policy 200 concurrent requests get one answer, and the effect happens once."""
    key = new_key()

    tasks = [asyncio.create_task(post_alone(live, "/waited", key, gate=key)) for _ in range(MANY)]
    await live.bench.noted(MANY, received=key)
    live.bench.open_gate(key)
    answers = await asyncio.gather(*tasks)

    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    [first] = [answer for answer in answers if "idempotent-replayed" not in answer.headers]
    for answer in answers:
        if answer is not first:
            same(first, answer)
    assert len(live.bench.lines(effect=key)) == 1


@over(EVERY)
async def test_a_burst_has_one_effect(live: Live) -> None:
    """Of 200 requests at once none waits for another: each gets 409 or the one answer."""
    key = new_key()

    answers = await asyncio.gather(*(post_alone(live, "/order", key) for _ in range(MANY)))
    retry = await post_alone(live, "/order", key)

    [first] = [
        answer for answer in answers if answer.status_code == 201 and "idempotent-replayed" not in answer.headers
    ]
    for answer in answers:
        if answer.status_code == 201 and answer is not first:
            same(first, answer)
        elif answer is not first:
            problem(answer, 409, "in-progress")
    same(first, retry)
    assert len(live.bench.lines(effect=key)) == 1


@over(EACH)
async def test_many_keys_at_once(live: Live) -> None:
    """200 concurrent requests with keys of their own all run: no pool of connections is exhausted."""
    keys = [new_key() for _ in range(MANY)]

    answers = await asyncio.gather(*(post_alone(live, "/order", key) for key in keys))
    retries = await asyncio.gather(*(post_alone(live, "/order", key) for key in keys))

    assert {answer.status_code for answer in answers} == {201}
    for answer, retry in zip(answers, retries, strict=True):
        same(answer, retry)
    ran = [line["effect"] for line in live.bench.lines() if line.get("effect") in keys]
    assert sorted(ran) == sorted(keys)


@over(EACH)
async def test_a_handler_longer_than_its_lease_keeps_it(live: Live) -> None:
    """While the handler runs on, for longer than a lease, duplicates are told 409; nothing runs twice."""
    key = new_key()

    async with live.client() as client:
        running = asyncio.create_task(post(client, "/leased", key, gate=key))
        await live.bench.effects(key)
        end = time.monotonic() + 1.5 * LEASE
        while time.monotonic() < end:
            problem(await post(client, "/leased", key), 409, "in-progress")
            await asyncio.sleep(LEASE / 20)
        live.bench.open_gate(key)
        first = await running
        retry = await post(client, "/leased", key)

    assert first.status_code == 201
    same(first, retry)
    assert len(live.bench.lines(effect=key)) == 1
