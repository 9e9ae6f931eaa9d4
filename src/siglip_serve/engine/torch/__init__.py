"""Towers run by torch."""
