"""Programs between callers and Triton. They need neither torch nor `siglip_serve`."""
