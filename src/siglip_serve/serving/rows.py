"""Handle the rows of requests: one by one with errors by index, joined into a batch, remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from siglip_serve.errors import ImageCostError, InvalidInputError

__all__ = ["Row", "RowBuffer", "RowCache", "map_rows", "refusal_of_rows"]

Item = TypeVar("Item")
Row = NDArray[Any]


def map_rows(name: str, rows: Sequence[Item], function: Callable[[Item], Row]) -> NDArray[Any]:
    """Stack `function` of every row.

    Raises:
        InvalidInputError: names up to five refused rows by their index.
        ImageCostError: names the first row that costs too much. No row after it is computed.
    """
    done: list[Row] = []
    refused: dict[int, InvalidInputError] = {}
    if not len(rows):
        raise InvalidInputError(f"{name}: no rows, expected at least one")
    for index, row in enumerate(rows):
        try:
            done.append(function(row))
        except ImageCostError as error:
            raise error.at(name, index) from error
        except InvalidInputError as error:
            refused[index] = error
    if refused:
        raise refusal_of_rows(name, refused)
    return np.asarray(done[0])[np.newaxis] if len(done) == 1 else np.stack(done)


def refusal_of_rows(name: str, refused: Mapping[int, InvalidInputError]) -> InvalidInputError:
    """Make one error of those of rows by their index, at least one. It names up to five."""
    errors = [error.at(name, index) for index, error in refused.items()]
    more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
    return type(errors[0])("; ".join(map(str, errors[:5])) + more)


class RowBuffer:
    """Memory in which the rows of several requests become one batch.

    It is kept, since fresh memory costs a page fault for every 4 kB. The next batch overwrites it.

    Args:
        staging: [most rows, ...], memory that a device reads faster. Larger batches lie elsewhere.
    """

    def __init__(self, staging: NDArray[Any] | None = None) -> None:
        self._staging = staging
        self._rows: NDArray[Any] = np.empty(0)

    def join(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Concatenate the parts [n, ...], which have one dtype and trailing shape."""
        count = sum(map(len, parts))
        if self._staging is not None and count <= len(self._staging):
            return np.concatenate(parts, out=self._staging[:count])
        if len(parts) == 1:
            return parts[0]
        if count > len(self._rows):
            self._rows = np.empty((count, *parts[0].shape[1:]), parts[0].dtype)
        return np.concatenate(parts, out=self._rows[:count])


class RowCache:
    """Arrays by key, at most `rows` of them. The least recently used are dropped."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._arrays: OrderedDict[bytes, Row] = OrderedDict()

    def get(self, key: bytes) -> Row | None:
        """Return the array of a key, and count it as used."""
        array = self._arrays.get(key)
        if array is not None:
            self._arrays.move_to_end(key)
        return array

    def put(self, key: bytes, array: Row) -> None:
        """Keep an array. A view keeps its whole base alive, so copy it first."""
        self._arrays[key] = array
        if len(self._arrays) > self._rows:
            self._arrays.popitem(last=False)
