"""Embed files without a server."""
