"""The exceptions of SigLIP Serve.

    SiglipServeError
    ├── SettingsError            unknown or malformed setting: the start stops
    ├── CheckpointError          unknown checkpoint, or weights that are not its own: the start stops
    ├── ServerStartError         tritonserver could not be started or never answered
    ├── InvalidInputError        the request is at fault: INVALID_ARGUMENT / 400
    │   ├── ImageError           not a decodable image
    │   ├── ImageTooLargeError   more bytes or pixels than the limits allow
    │   ├── ParameterError       an unknown request parameter, or a value that it cannot have
    │   ├── StateError           not a team state, or one of other embeddings
    │   └── TextError            not a usable text
    └── UnavailableError         the server cannot serve it now, a retry may help: UNAVAILABLE / 503
        └── DeviceMemoryError    not even one row fits into the device's memory

An `InvalidInputError` raised for one element knows nothing of the tensor it came from; `at()` adds
the tensor's name and the element's index, so that a message reads
`INPUT_IMAGE[3]: not a decodable image`.
"""

from __future__ import annotations

__all__ = [
    "START_REFUSED",
    "CheckpointError",
    "DeviceMemoryError",
    "ImageError",
    "ImageTooLargeError",
    "InvalidInputError",
    "ParameterError",
    "ServerStartError",
    "SettingsError",
    "SiglipServeError",
    "StateError",
    "TextError",
    "UnavailableError",
]

# Marks, in the server's log, the line that tells why a model did not start.
START_REFUSED = "siglip-serve cannot start: "


class SiglipServeError(Exception):
    """Base of every exception that SigLIP Serve raises on purpose."""


class SettingsError(SiglipServeError):
    """A setting or model parameter is unknown, or its value is not of the expected form."""


class CheckpointError(SiglipServeError):
    """A checkpoint cannot be found, or does not hold the model that it claims to hold."""


class ServerStartError(SiglipServeError):
    """The server did not start; the message ends with the log's last lines."""


class InvalidInputError(SiglipServeError):
    """A request's input is not what the model takes."""

    def at(self, name: str, index: int | None = None) -> InvalidInputError:
        """The same error with the input's name, and the element's index, in front."""
        where = name if index is None else f"{name}[{index}]"
        return type(self)(f"{where}: {self}")


class ImageError(InvalidInputError):
    """The bytes are not a decodable image."""


class ImageTooLargeError(InvalidInputError):
    """The image has more bytes or pixels than the limits allow."""


class ParameterError(InvalidInputError):
    """A request parameter is unknown, or its value is not one that it can have."""


class StateError(InvalidInputError):
    """The bytes are not a team state, or one that was fitted to other embeddings."""


class TextError(InvalidInputError):
    """The bytes are not a usable text."""


class UnavailableError(SiglipServeError):
    """The server cannot serve this now; trying again later may help."""


class DeviceMemoryError(UnavailableError):
    """Not even a batch of one row fits into the device's memory."""
