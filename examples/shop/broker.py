"""The messages between the services: who handles which, and what is in them.

Each broker has a module with the same names: ``create``, ``consume``, ``body_of``, and ``PUBLISH``, the URL by which a
relay publishes. The URL of the broker says which module is used.
"""

from __future__ import annotations

import json
from typing import Any

from shop.orders import Order
from shop.settings import BROKER

if BROKER.startswith("nats"):
    from shop.on_nats import PUBLISH, body_of, consume, create
else:
    from shop.on_rabbitmq import PUBLISH, body_of, consume, create

__all__ = ["HANDLED", "PUBLISH", "consume", "create", "read"]

HANDLED = {
    "inventory": ["ReserveStock", "ReleaseStock"],
    "marketing": ["RedeemCoupon", "GiveBackCoupon", "OrderPlaced", "OrderConfirmed", "OrderRejected"],
    "orders": ["StockReserved", "StockRefused", "CouponRedeemed", "CouponRefused"],
}
"""The types of message that each service handles."""


def read(message: Any) -> tuple[str, Order, dict[str, Any]]:
    """Return the type of a message, the order that it is about, and what else it says."""
    content = json.loads(body_of(message))
    order = Order(*(content.pop(name) for name in ("id", "customer", "reference", "item", "coupon")))
    return str(message.headers["eventType"]), order, content
