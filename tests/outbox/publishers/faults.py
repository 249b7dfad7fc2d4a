"""The faults of a broker behind a proxy, as the contract of publishers asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from idempotency.testing.publishers import Fault
from tests.kit.servers import free_port
from tests.kit.tcp_proxy import Proxy


class BehindProxy:
    """The fixtures of the contract, for a publisher that connects to the broker at ``broker_port`` by ``proxy``."""

    @pytest.fixture
    def proxy(self, broker_port: int) -> Iterator[Proxy]:
        with Proxy(broker_port, keep_requests=False) as proxy:
            yield proxy

    @pytest.fixture
    def delivery_timeout(self, request: pytest.FixtureRequest) -> float:
        """Seconds: few only where they are to run out."""
        return 2.0 if "hang_broker" in request.fixturenames else 60.0

    @pytest.fixture
    def break_broker(self, proxy: Proxy) -> Fault:
        async def break_broker() -> None:
            proxy.aim(free_port())

        return break_broker

    @pytest.fixture
    def hang_broker(self, proxy: Proxy) -> Fault:
        async def hang_broker() -> None:
            proxy.pause()

        return hang_broker

    @pytest.fixture
    def cut_replies(self, proxy: Proxy) -> Callable[[int], None]:
        def cut_replies(after: int) -> None:
            proxy.cut_after(after, replies=True)

        return cut_replies

    @pytest.fixture
    def mend_broker(self, proxy: Proxy, broker_port: int) -> Fault:
        async def mend_broker() -> None:
            proxy.disarm()
            proxy.resume()
            if proxy.target != broker_port:
                proxy.aim(broker_port)

        return mend_broker
