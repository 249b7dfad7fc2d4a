"""The saga of an order: it asks the services one after the other, and undoes what they did when one refuses.

Each step commits its message with its record, so that a process that is killed asks nobody twice. While the saga waits
for an answer it is a row, and no process. An undo is recorded by its name, and found in this module.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from idempotency.saga import saga, step, wait_for
from shop import orders
from shop.orders import Order, OrderAccepted, OrderConfirmed, OrderRejected

service = orders.service


class RefusedError(Exception):
    """A service has refused."""


# What the steps do, and what undoes them: each in one transaction with its record.


async def accept(order: Order, session: AsyncSession) -> None:
    await orders.record(session, order, OrderAccepted())


async def reject(order: Order, session: AsyncSession, failure: Any) -> None:
    await orders.record(session, order, OrderRejected(failure.message))
    orders.tell("OrderRejected", order, service.outbox)


async def reserve(order: Order, session: AsyncSession) -> None:
    orders.tell("ReserveStock", order, service.outbox)


async def release(order: Order, session: AsyncSession) -> None:
    orders.tell("ReleaseStock", order, service.outbox)


async def redeem(order: Order, session: AsyncSession) -> None:
    orders.tell("RedeemCoupon", order, service.outbox)


async def give_back(order: Order, session: AsyncSession) -> None:
    orders.tell("GiveBackCoupon", order, service.outbox)


async def confirm(order: Order, session: AsyncSession) -> None:
    await orders.record(session, order, OrderConfirmed())
    orders.tell("OrderConfirmed", order, service.outbox)


async def agreed(about: str) -> None:
    """Wait for the answer of a service. It has no time-out: a service that is away delays an order, and no more."""
    if refused := await wait_for(about):
        raise RefusedError(refused)


@saga(service.store, name="fulfil", session=service.sessions, lease=3.0)
async def fulfil(order: Order) -> None:
    await step("accept", accept, order, undo=reject)
    await step("reserve", reserve, order, undo=release)
    await agreed("stock")
    if order.coupon:
        await step("redeem", redeem, order, undo=give_back)
        await agreed("coupon")
    await step("confirm", confirm, order, kind="pivot")
