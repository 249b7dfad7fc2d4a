"""The contracts that are shipped as tests."""

from __future__ import annotations

import pytest

from idempotency.testing import JournalContract, PublisherContract, StoreContract


@pytest.mark.parametrize("contract", [JournalContract, PublisherContract, StoreContract])
def test_no_test_hides_another(contract: type) -> None:
    """Two parts of a contract have no test of the same name: only one of them would run."""
    names = [name for part in contract.__mro__ for name in vars(part) if name.startswith("test_")]

    assert len(names) > 20
    assert len(names) == len(set(names))
