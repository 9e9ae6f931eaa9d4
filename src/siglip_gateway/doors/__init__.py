"""Doors in front of Triton's own ports: they pass requests through and keep from Triton what ends it."""

__all__ = ["AWAY", "DRAIN"]

AWAY = "Triton is not running; it is being started again"  # the clients ask again
DRAIN = 30.0  # seconds that running requests have to complete after SIGTERM
