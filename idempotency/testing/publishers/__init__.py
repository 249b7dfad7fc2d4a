"""The contract of a publisher of the outbox, as tests: subclass it, and give two fixtures.

    class TestMyPublisher(PublisherContract):
        @pytest.fixture
        async def publisher(self):
            publisher = MyPublisher(..., delivery_timeout=2)
            yield publisher
            await publisher.aclose()

        @pytest.fixture
        def received(self):
            async def received(count: int) -> list[Received]: ...
            return received

The tests are coroutines: use pytest-asyncio in its auto mode, or mark the subclass.
"""

from __future__ import annotations

from idempotency.testing.publishers._common import PATIENCE, Fault, Receive, Received, new_message
from idempotency.testing.publishers._contents import ContentsContract
from idempotency.testing.publishers._failures import FailureContract
from idempotency.testing.publishers._ordering import OrderContract
from idempotency.testing.publishers._refusals import RefusalContract

__all__ = ["PATIENCE", "Fault", "PublisherContract", "Receive", "Received", "new_message"]


class PublisherContract(ContentsContract, OrderContract, RefusalContract, FailureContract):
    """Check a publisher.

    Give two fixtures. ``publisher``: open, on a place that is new for each test, to which messages of the aggregate
    type ``order`` go. ``received``: a coroutine function that waits until a consumer of the broker has had ``count``
    messages of that place, and returns all that it has had so far, in their order.

    Five more make it stricter; the tests that need one are skipped without it:

    - ``too_large``: the bytes of a payload that the broker refuses;
    - ``break_broker``: a coroutine function that aborts the connections, and lets no new one be made;
    - ``hang_broker``: one after which connections stay open and nothing is answered;
    - ``cut_replies``: a function that aborts the connection after so many more bytes of the broker's replies;
    - ``mend_broker``: a coroutine function that undoes these three.

    State what the broker does in the attributes of the class.
    """
