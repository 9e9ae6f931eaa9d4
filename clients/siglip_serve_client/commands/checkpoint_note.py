"""The note that a checkpoint carries for its users, such as what it was trained on."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from siglip_serve_client._client import Client
from siglip_serve_client.errors import ClientError, DeadlineError, UnreachableError

__all__ = ["print_note", "show_note"]


def print_note(client: Client, model: str = "siglip_vision_model") -> None:
    """Ask for the checkpoint of a model, and print its note as `show_note` does.

    Raises:
        DeadlineError, UnreachableError: the server does not answer. Other failures mean no note: the server
            may lack the model, or a proxy may forbid the question.
    """
    try:
        described = client.describe(model)
    except (DeadlineError, UnreachableError):
        raise
    except ClientError:
        return
    show_note(described)


def show_note(described: Mapping[str, str]) -> None:
    """Print the note in an answer of `Client.describe`, if there is one, as a line on standard error."""
    if note := described["checkpoint_note"]:
        name = described["checkpoint_name"]
        print(f"siglip-serve: note: the server runs {name}, which {note}", file=sys.stderr)
