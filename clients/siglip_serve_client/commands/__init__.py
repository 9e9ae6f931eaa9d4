"""The command `siglip-serve`."""
