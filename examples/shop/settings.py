"""The settings of the shop, which the environment can change. Every other module reads them here."""

from __future__ import annotations

import json
import os

DATABASES = os.environ.get("SHOP_DATABASES", "sqlite+aiosqlite:///shop-{}.db")
"""The URL of the database of a service, whose name takes the place of the braces."""

BROKER = os.environ.get("SHOP_BROKER", "nats://localhost:4222")
NAME = os.environ.get("SHOP_NAME", "shop")
"""The first part of the subjects of NATS, or the name of the exchange of RabbitMQ."""

API = os.environ.get("SHOP_API", "http://127.0.0.1:8000")
TOOLS = os.environ.get("SHOP_TOOLS", "http://127.0.0.1:8001/mcp")

STOCK: dict[str, int] = json.loads(os.environ.get("SHOP_STOCK", '{"tea": 10, "cake": 2}'))
COUPONS: dict[str, int] = json.loads(os.environ.get("SHOP_COUPONS", '{"SPRING": 3}'))
"""How many pieces of an item, and uses of a coupon, there are at first."""

LEASE = 3.0
"""Seconds after which another process goes on with the work of one that was killed. The library's default is 30."""
