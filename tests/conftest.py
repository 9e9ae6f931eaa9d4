"""Before any test is imported: where there is no GPU, Triton's kernels run in its interpreter.

Here, since the language's own functions become interpreted ones only if this is set before they are imported,
which torch does at times of its choosing.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
