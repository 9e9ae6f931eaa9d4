"""The server's log: open it, write into it, and find in it why a start failed.

No failure to write a line reaches the caller, because the processes are watched whether or not there is a
disk to write on.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from siglip_serve.errors import START_REFUSED, ServerStartError

__all__ = ["Journal", "asked_to_end", "cause", "is_refused", "loading", "open_log", "read", "size", "tail"]

_MOST_BYTES = 16 * 2**20  # of a log that is searched


class Journal:
    """Writes the launcher's own lines to standard error and to the server's log.

    Args:
        log_file: the server's log.
    """

    def __init__(self, log_file: Path) -> None:
        self._log_file = log_file

    def say(self, text: str) -> None:
        """Write one line; a full disk, a deleted folder or a closed standard error loses it."""
        line = f"siglip-serve: {text}\n"
        # ValueError: standard error is closed. AttributeError: there is none.
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(line)
            sys.stderr.flush()
        with suppress(OSError), self._log_file.open("a", encoding="utf-8") as log:
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


def read(log_file: Path, start: int = 0) -> str:
    """Read a log from byte `start` on, at most its last 16 MiB; empty if there is none to read.

    A log that is a device has no end, so only regular files are read.
    """
    try:
        with log_file.open("rb") as log:
            status = os.fstat(log.fileno())
            if not stat.S_ISREG(status.st_mode):
                return ""
            log.seek(max(start, status.st_size - _MOST_BYTES))
            return log.read(_MOST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def size(log_file: Path) -> int:
    """Measure a log in bytes; 0 if there is none."""
    try:
        return log_file.stat().st_size
    except OSError:
        return 0


def loading(log_file: Path, start: int, models: Sequence[str]) -> list[str]:
    """Name the models that began to load, but have not completed it, since byte `start` of the log."""
    text = read(log_file, start)
    begun = set(re.findall(r"TRITONBACKEND_ModelInstanceInitialize: (\w+?)_\d+_\d+ ", text))
    return [model for model in models if model in begun and f"successfully loaded '{model}'" not in text]


def is_refused(log_file: Path, start: int) -> bool:
    """Find out if a model refused to start, as it will each time, since byte `start` of the log."""
    return START_REFUSED in read(log_file, start)


def asked_to_end(log_file: Path, start: int) -> bool | None:
    """Find out if the server got SIGINT or SIGTERM since byte `start` of the log.

    It also logs the signals of its crashes.

    Returns:
        None where the log cannot tell, because it is a device or is gone.
    """
    if not log_file.is_file():
        return None
    return bool(re.search(r"^Signal \((2|15)\) received", read(log_file, start), re.MULTILINE))


def cause(log_file: Path) -> str:
    """Find why a start failed: the models' own messages, else Triton's errors, else the last lines."""
    text = read(log_file)
    found = re.findall(rf'{START_REFUSED}(.*?)(?:\\n\\nAt:| *\||"?$)', text, re.MULTILINE)
    if found:  # the log holds a message in one line, repeated for every model that depends on the failed one
        return "\n".join(dict.fromkeys(found)).replace("\\n", "\n")
    errors = [line for line in text.splitlines() if re.match(r"E\d{4} .*failed|error:", line)]
    if errors:
        return "\n".join(["tritonserver ended during startup:", *errors[:8], f"the whole log: {log_file}"])
    return f"tritonserver ended during startup\n{tail(log_file)}"


def tail(log_file: Path, lines: int = 25) -> str:
    """Quote the last lines of a log."""
    text = read(log_file).splitlines()
    return "\n".join([f"the last lines of {log_file}:", *text[-lines:]])
