"""Prove a store, or a handler of your own."""
