"""The saga of an order: it asks the services one after the other, and undoes what they did when one refuses.

Read ``fulfil`` first, at the end. Each step commits its message with the record of the step, so that a crash neither
loses a message nor adds one. While the saga waits for an answer, it is a row in the database, and no process runs it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from idempotency.saga import saga, step, wait_for
from shop import orders
from shop.orders import Order, OrderAccepted, OrderConfirmed, OrderRejected
from shop.settings import LEASE

service = orders.service


class RefusedError(Exception):
    """A service has refused."""


# What the steps do, and what undoes them. The session is that of the step: the library commits it with the record. It
# records an undo by the name of its function, and finds the function in this module.


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


async def answer_of(service_name: str) -> None:
    """Wait for the signal that a service has agreed, or why it has refused. The wait has no time-out."""
    if refused := await wait_for(service_name):
        raise RefusedError(refused)


@saga(service.store, name="fulfil", session=service.sessions, lease=LEASE)
async def fulfil(order: Order) -> None:
    # When a later step fails, the undos run in reverse order, so that this one rejects the order at the very end.
    await step("accept", accept, order, undo=reject)
    await step("reserve", reserve, order, undo=release)
    await answer_of("inventory")
    if order.coupon:
        await step("redeem", redeem, order, undo=give_back)
        await answer_of("marketing")
    # The pivot: once it is done, nothing is undone any more.
    await step("confirm", confirm, order, kind="pivot")
