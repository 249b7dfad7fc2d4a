"""Marketing: it redeems coupons and gives them back when the saga asks, and it writes mails about orders.

    python -m shop.marketing

The coupons are orchestrated: the saga asks, and waits for the answer. The mails are choreographed: marketing handles
the messages about orders, nobody asks for a mail, and nobody waits for one.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from sqlalchemy import String, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotency import idempotent_consumer
from shop.broker import read
from shop.database import Service
from shop.orders import Order, tell
from shop.serving import serve


class Base(DeclarativeBase):
    type_annotation_map: ClassVar = {str: String(200)}


class Coupon(Base):
    __tablename__ = "coupons"
    code: Mapped[str] = mapped_column(primary_key=True)
    uses: Mapped[int]


class Use(Base):
    """A use of a coupon: 1 that was redeemed, or -1 that was given back."""

    __tablename__ = "uses"
    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]
    code: Mapped[str]
    uses: Mapped[int]


class Mail(Base):
    __tablename__ = "mails"
    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str]
    subject: Mapped[str]


service = Service("marketing")


async def use(session: AsyncSession, order: Order, uses: int) -> bool:
    """Use a coupon, or give it back; return False where there is none."""
    coupon = await session.get(Coupon, order.coupon, with_for_update=True)
    if coupon is None or coupon.uses < uses:
        return False
    coupon.uses -= uses
    session.add(Use(order=order.id, code=order.coupon, uses=uses))
    return True


@idempotent_consumer(service.store, consumer="marketing", session=service.sessions, max_attempts=20)
async def on_message(message: Any, session: AsyncSession) -> None:
    type, order, _ = read(message)
    if type == "RedeemCoupon":
        redeemed = await use(session, order, 1)
        if redeemed:
            tell("CouponRedeemed", order, service.outbox, refused=None)
        else:
            tell("CouponRefused", order, service.outbox, refused="no such coupon")
    elif type == "GiveBackCoupon":
        used = await session.scalar(select(func.sum(Use.uses)).where(Use.order == order.id))
        if used:  # otherwise the coupon was refused, and there is nothing to give back
            await use(session, order, -int(used))
    elif type.startswith("Order"):
        session.add(Mail(order=order.id, subject=type))


async def create(coupons: dict[str, int]) -> None:
    await service.create(Base, *(Coupon(code=code, uses=uses) for code, uses in coupons.items()))


if __name__ == "__main__":
    asyncio.run(serve(service, on_message))
