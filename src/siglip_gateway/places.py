"""Places of inputs: messages of Triton name its tensors, and callers of the gateway know fields of JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping

from siglip_serve_client.errors import InvalidInputError

__all__ = ["placed"]


def placed(error: InvalidInputError, fields: Mapping[str, str]) -> InvalidInputError:
    """The error with fields in place of tensors: `PROMPTS[1]: ...` becomes `prompts[1]: ...`.

    Args:
        error: of Triton.
        fields: the field of each tensor. `[0]` after a tensor says that it has one element, whose index is
            left out.
    """
    names = {name.removesuffix("[0]"): field for name, field in fields.items()}
    single = {name.removesuffix("[0]") for name in fields if name.endswith("[0]")}

    def field(found: re.Match[str]) -> str:
        return names[found[1]] + ("" if found[1] in single else found[2] or "")

    pattern = rf"\b({'|'.join(map(re.escape, names))})\b(\[\d+\])?"
    message = re.sub(pattern, field, str(error))
    return InvalidInputError(message.replace("set truncation", "set truncate"))
