"""Run the shop of examples/shop as processes, kill each of them while customers order, and check its books."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from uuid import uuid4

from _shop.brokers import administered, broker, free_port
from _shop.databases import databases
from _shop.processes import Process, environment_of, processes

CREATE = [sys.executable, "-m", "shop.create"]
STOCK, COUPONS = {"tea": 1000, "cake": 3}, {"SPRING": 5}


class ShopError(Exception):
    """The shop cannot be opened; the message says why."""


async def run(options: argparse.Namespace, directory: Path) -> bool:
    """Run the shop; return whether its books agree."""
    name, ports = f"shop_{uuid4().hex[:8]}", (free_port(), free_port())
    async with databases(options.store, name, directory) as store, broker(options.broker, directory) as url:
        settings = {
            "SHOP_DATABASES": store,
            "SHOP_BROKER": url,
            "SHOP_NAME": name,
            "SHOP_API": f"http://127.0.0.1:{ports[0]}",
            "SHOP_TOOLS": f"http://127.0.0.1:{ports[1]}/mcp",
            "SHOP_STOCK": json.dumps(STOCK),
            "SHOP_COUPONS": json.dumps(COUPONS),
        }
        # The modules of the shop read their settings when they are imported.
        os.environ.update(settings)
        sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
        environment = environment_of()
        opening = subprocess.Popen(
            CREATE, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        from shop.broker import HANDLED, PUBLISH

        from _shop.play import OCCASIONS, Play

        _, said = await asyncio.to_thread(opening.communicate)
        if opening.returncode:
            raise ShopError((said.splitlines() or ["it cannot be created"])[-1])
        agent = Process("agent", ["shop.agent", *OCCASIONS], environment, directory / "agent.log")
        async with administered(url, name, HANDLED) as admin:
            running = processes(environment, ports, PUBLISH, directory)
            play = Play(running, agent, admin, STOCK, COUPONS, options.customers, options.pause)
            await play.run()
            agree = await play.report()
        await close_engines()
    return agree


async def close_engines() -> None:
    from _shop.play import SERVICES

    for service in SERVICES:
        await service.engine.dispose()


def main() -> int:
    """Return the exit status: 0 if the books agree, 1 if not, 2 if the shop could not be opened."""
    parser = argparse.ArgumentParser(prog="scripts/demo --shop", description=__doc__)
    parser.add_argument("--shop", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--store", metavar="URL", help="a SQL server; default: SQLite files")
    parser.add_argument("--broker", metavar="URL", help="nats:// or amqp://; default: a NATS of its own")
    parser.add_argument("--customers", metavar="N", type=int, default=4, help="that order at once; default 4")
    parser.add_argument("--pause", metavar="SECONDS", type=float, default=2.0, help="between two kills; default 2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shop-", ignore_cleanup_errors=True) as directory:
        try:
            agree = asyncio.run(run(options, Path(directory)))
        except (ShopError, OSError) as error:
            print(f"scripts/demo: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
