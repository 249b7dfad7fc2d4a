"""Telemetry of keyed operations."""
