"""The books: what the databases say in the end, and whether all of it agrees."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shop import inventory, marketing, orders, views
from shop.orders import OrderConfirmed, OrderPlaced, OrderRejected
from sqlalchemy import select


@dataclass
class Books:
    """``placed``: each order as its events say it. The rest is by order, item or code."""

    placed: dict[str, OrderPlaced] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    listed: dict[str, str] = field(default_factory=dict)
    stock: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    coupons: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    mails: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


async def read() -> Books:
    """Read the databases of all services."""
    books = Books()
    async with orders.service.sessions() as session:
        async for event in orders.events.read_all(session):
            id = event.stream.removeprefix("order-")
            match event.data:
                case OrderPlaced():
                    books.placed[id], books.states[id] = event.data, "placed"
                case OrderConfirmed():
                    books.states[id] = "confirmed"
                case OrderRejected():
                    books.states[id] = "rejected"
        books.listed = {row.id: row.state for row in await session.scalars(select(views.Row))}
    async with inventory.service.sessions() as session:
        books.stock = {row.item: row.pieces for row in await session.scalars(select(inventory.Stock))}
        for movement in await session.scalars(select(inventory.Movement)):
            books.moved[movement.order] += movement.pieces
    async with marketing.service.sessions() as session:
        books.coupons = {row.code: row.uses for row in await session.scalars(select(marketing.Coupon))}
        for use in await session.scalars(select(marketing.Use)):
            books.used[use.order] += use.uses
        for mail in await session.scalars(select(marketing.Mail)):
            books.mails[mail.order].append(mail.subject)
    return books


def disagreements(
    books: Books, wanted: list[tuple[str, str]], stock: Mapping[str, int], coupons: Mapping[str, int]
) -> Iterator[str]:
    """Say what does not agree.

    ``wanted``: who ordered, and under which reference. ``stock`` and ``coupons``: what there was in the beginning.
    """
    found = Counter((placed.customer, placed.reference) for placed in books.placed.values())
    for who in sorted({*wanted, *found}):
        if found[who] != wanted.count(who):
            yield f"{who[0]} has {found[who]} orders {who[1]!r}, not {wanted.count(who)}"
    for id, placed in books.placed.items():
        yield from _of_order(id, placed, books)
    confirmed = [placed for id, placed in books.placed.items() if books.states[id] == "confirmed"]
    sold, redeemed = Counter(each.item for each in confirmed), Counter(each.coupon for each in confirmed)
    for item, pieces in books.stock.items():
        if pieces != stock[item] - sold[item]:
            yield f"{pieces} {item} in stock, not {stock[item] - sold[item]}: {sold[item]} of {stock[item]} are sold"
    for code, uses in books.coupons.items():
        if uses != coupons[code] - redeemed[code]:
            yield f"{uses} uses of {code}, not {coupons[code] - redeemed[code]}: {redeemed[code]} are redeemed"


def _of_order(id: str, placed: OrderPlaced, books: Books) -> Iterator[str]:
    state = books.states[id]
    if state not in ("confirmed", "rejected"):
        yield f"order {id} is still {state}"
        return
    sold = state == "confirmed"
    if books.listed.get(id) != state:
        yield f"order {id} is {state}, and {books.listed.get(id, 'missing')} in the list"
    if books.moved.get(id, 0) != -sold:
        yield f"order {id} is {state}, and moved {books.moved.get(id, 0)} {placed.item}"
    if books.used.get(id, 0) != (sold and placed.coupon is not None):
        yield f"order {id} is {state}, and used {books.used.get(id, 0)} of its coupon {placed.coupon}"
    if sorted(books.mails.get(id, [])) != sorted(["OrderPlaced", f"Order{state.capitalize()}"]):
        yield f"order {id} is {state}, and has the mails {', '.join(books.mails.get(id, [])) or 'none'}"
