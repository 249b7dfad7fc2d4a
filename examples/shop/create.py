"""Create the databases of the shop and its queues at the broker, with the first stock and coupons.

python -m shop.create
"""

from __future__ import annotations

import asyncio

from shop import broker, inventory, marketing, orders, tools, views
from shop.settings import COUPONS, STOCK


async def main() -> None:
    await orders.create()
    await views.create()
    await inventory.create(STOCK)
    await marketing.create(COUPONS)
    await tools.service.create(None)
    await broker.create(broker.HANDLED)


if __name__ == "__main__":
    asyncio.run(main())
