"""The API of the shop: a request that is repeated with its key places one order, and gets the first answer again.

    uvicorn --app-dir examples shop.api:app

Four things commit in one transaction, or none does: the recorded answer under its key, the order, the message that it
is placed, and the saga that carries it out.
"""

from __future__ import annotations

from uuid import uuid4

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from idempotency import IdempotencyMiddleware, Policy
from idempotency.projections import SyncTokenMiddleware, sync_token
from shop import orders, views
from shop.orders import Order, OrderPlaced
from shop.saga import fulfil
from shop.settings import LEASE


async def place_order(request: Request) -> JSONResponse:
    session = request.state.idempotency.session  # the middleware commits it
    wanted = await request.json()
    customer = request.headers["Authorization"].removeprefix("Bearer ")
    order = Order(str(uuid4()), customer, wanted["reference"], wanted["item"], wanted.get("coupon"))
    placed = OrderPlaced(order.customer, order.reference, order.item, order.coupon)
    appended = await orders.record(session, order, placed)
    orders.tell("OrderPlaced", order, orders.service.outbox)
    await fulfil.start(order, key=order.id, session=session)
    return JSONResponse({"id": order.id}, 201, {"Sync-Token": sync_token(appended)})


async def see_order(request: Request) -> JSONResponse:
    found = await views.find(request.path_params["id"])
    return JSONResponse(found, 200 if found else 404)


routes = [Route("/orders", place_order, methods=["POST"]), Route("/orders/{id}", see_order)]
idempotent = Middleware(
    IdempotencyMiddleware,
    store=orders.service.store,
    session=orders.service.sessions,
    policy=Policy(required=True, lease=LEASE),
)
# A customer who gives back the Sync-Token of the first answer waits until the read model has the order.
reading = Middleware(SyncTokenMiddleware, projections=[views.order_list])
app = Starlette(routes=routes, middleware=[reading, idempotent])
