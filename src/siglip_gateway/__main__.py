"""`python -m siglip_gateway`: the command `siglip-serve gateway`, as the launcher starts it."""

from __future__ import annotations

import sys

from siglip_gateway.command import main

if __name__ == "__main__":
    sys.exit(main())
