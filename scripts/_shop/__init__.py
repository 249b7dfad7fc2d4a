"""Run the shop of examples/shop as processes, kill each of them, and check the books."""
