"""The gateway between callers and Triton. It needs neither torch nor `siglip_serve`."""
