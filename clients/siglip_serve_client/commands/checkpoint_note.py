"""The note that a checkpoint carries for its users, such as what it was trained on."""

from __future__ import annotations

import sys

from siglip_serve_client._client import Client
from siglip_serve_client.errors import ClientError, DeadlineError, UnreachableError

__all__ = ["print_note"]


def print_note(client: Client, model: str = "siglip_vision_model") -> None:
    """Print the note of a model's checkpoint, if it has one, as a line on standard error.

    Raises:
        DeadlineError, UnreachableError: the server does not answer. Other failures mean no note: the server
            may lack the model, or a proxy may forbid the question.
    """
    try:
        note = client.describe(model)["checkpoint_note"]
    except (DeadlineError, UnreachableError):
        raise
    except ClientError:
        return
    if note:
        print(f"siglip-serve: note: {note}", file=sys.stderr)
