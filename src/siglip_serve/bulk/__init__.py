"""Embed many pictures without a server: `siglip-serve bulk`."""
