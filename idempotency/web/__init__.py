"""A page that shows what is stuck, and why."""
