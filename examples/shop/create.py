"""Create the databases and the queues of the shop, and put something on its shelves.

python -m shop.create
"""

from __future__ import annotations

import asyncio
import json
import os

from shop import broker, inventory, marketing, orders, tools, views

STOCK: dict[str, int] = json.loads(os.environ.get("SHOP_STOCK", '{"tea": 10, "cake": 2}'))
COUPONS: dict[str, int] = json.loads(os.environ.get("SHOP_COUPONS", '{"SPRING": 3}'))


async def main() -> None:
    await orders.create()
    await views.create()
    await inventory.create(STOCK)
    await marketing.create(COUPONS)
    await tools.service.create(None)
    await broker.create()


if __name__ == "__main__":
    asyncio.run(main())
