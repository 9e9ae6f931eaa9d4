"""Doors in front of Triton's own ports: they pass requests through and keep from Triton what ends it."""
