"""The server's log: open it, write into it, and find in it why a start failed."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from siglip_serve.errors import START_REFUSED, ServerStartError

__all__ = ["Journal", "cause", "open_log", "tail"]


class Journal:
    """Writes the launcher's own lines to standard error and to the server's log.

    Args:
        log_file: the server's log.
    """

    def __init__(self, log_file: Path) -> None:
        self._log_file = log_file

    def say(self, text: str) -> None:
        """Write one line."""
        line = f"siglip-serve: {text}\n"
        sys.stderr.write(line)
        with self._log_file.open("a", encoding="utf-8") as log:
            log.write(line)


def open_log(chosen: Path | None, http_port: int) -> Path:
    """Make an empty log file: `chosen`, or the port's file in the user's state directory.

    Raises:
        ServerStartError: the file cannot be written.
    """
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111
    file = chosen or Path(state) / "siglip-serve" / f"{http_port}.log"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    except OSError as error:
        raise ServerStartError(
            f"log file {file}: {error.strerror}; choose another one with --log-file"
        ) from error
    return file


def cause(log_file: Path) -> str:
    """Find why a start failed: the models' own messages, else Triton's errors, else the last lines."""
    text = log_file.read_text(encoding="utf-8", errors="replace")
    found = re.findall(rf'{START_REFUSED}(.*?)(?:\\n\\nAt:| *\||"?$)', text, re.MULTILINE)
    if found:  # the log holds a message in one line, repeated for every model that depends on the failed one
        return "\n".join(dict.fromkeys(found)).replace("\\n", "\n")
    errors = [line for line in text.splitlines() if re.match(r"E\d{4} .*failed|error:", line)]
    if errors:
        return "\n".join(["tritonserver ended during startup:", *errors[:8], f"the whole log: {log_file}"])
    return f"tritonserver ended during startup\n{tail(log_file)}"


def tail(log_file: Path, lines: int = 25) -> str:
    """Quote the last lines of a log."""
    text = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"the last lines of {log_file}:", *text[-lines:]])
