"""The exceptions of SigLIP Serve.

    SiglipServeError
    ├── SettingsError            unknown or malformed setting: startup fails
    ├── CheckpointError          unknown checkpoint, or weights of another model: startup fails
    ├── ServerStartError         tritonserver did not start or never answered
    ├── InvalidInputError        the request is at fault: INVALID_ARGUMENT / 400
    │   ├── ImageError           not a decodable image
    │   ├── ImageTooLargeError   more bytes or pixels than the limits allow
    │   │   └── ImageCostError   decoding takes more time or memory than the limits allow
    │   ├── ParameterError       unknown request parameter, or a value that it cannot have
    │   ├── StateError           not a team state, or a state of other embeddings
    │   └── TextError            not a usable text
    └── UnavailableError         the server cannot answer now, a retry may help: UNAVAILABLE / 503
        └── DeviceMemoryError    not even one row fits into the device's memory

Code that raises an `InvalidInputError` for one element does not know the tensor. Its caller adds the
tensor's name and the element's index with `at()`: `INPUT_IMAGE[3]: not a decodable image`.
"""

from __future__ import annotations

__all__ = [
    "START_REFUSED",
    "CheckpointError",
    "DeviceMemoryError",
    "ImageCostError",
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

# Marks the line of the server's log that says why a model did not start.
START_REFUSED = "siglip-serve cannot start: "


class SiglipServeError(Exception):
    """Base of every exception that SigLIP Serve raises on purpose."""


class SettingsError(SiglipServeError):
    """A setting or model parameter is unknown, or its value is not of the expected form."""


class CheckpointError(SiglipServeError):
    """A checkpoint cannot be found, or its files do not hold the model that its configuration describes."""


class ServerStartError(SiglipServeError):
    """The server did not start; the message ends with the log's last lines."""


class InvalidInputError(SiglipServeError):
    """A request's input does not meet the model's requirements."""

    def at(self, name: str, index: int | None = None) -> InvalidInputError:
        """Copy the error with the input's name, and the element's index, in front of its message."""
        where = name if index is None else f"{name}[{index}]"
        return type(self)(f"{where}: {self}")


class ImageError(InvalidInputError):
    """The bytes are not a decodable image."""


class ImageTooLargeError(InvalidInputError):
    """The image has more bytes or pixels than the limits allow."""


class ImageCostError(ImageTooLargeError):
    """Decoding the image takes more CPU time or memory than the limits allow."""


class ParameterError(InvalidInputError):
    """A request parameter is unknown, or it cannot have the value."""


class StateError(InvalidInputError):
    """The bytes are not a team state, or the state was fitted to other embeddings."""


class TextError(InvalidInputError):
    """The bytes are not a usable text."""


class UnavailableError(SiglipServeError):
    """The server cannot answer now; a later retry may succeed."""


class DeviceMemoryError(UnavailableError):
    """Not even a batch of one row fits into the device's memory."""
