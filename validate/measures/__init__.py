"""Measures of quality: pure functions on arrays."""
