"""A shop as one system: an API, two services, a saga, a read model and an agent. See docs/shop.md."""
