"""Answer the models of texts: texts become token ids, ids become embeddings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.config import tensor_dims
from siglip_serve.errors import InvalidInputError, TextError
from siglip_serve.serving.context import Context, engine_plan, readable_start
from siglip_serve.serving.counters import TowerCounter
from siglip_serve.serving.request import Request
from siglip_serve.serving.respond import BatchModel, Outputs, select
from siglip_serve.serving.rows import RowBuffer, RowCache, refusal_of_rows
from siglip_serve.texts.tokenizer import decode_text, load_tokenizer

if TYPE_CHECKING:
    from siglip_serve.engine.passes import Batch

__all__ = ["SiglipTextModel", "SiglipTextTokenize"]

_LONGEST_KEY = 1024


@dataclass(frozen=True)
class _Texts:
    """The texts of a request, and if those that do not fit are cut."""

    rows: list[bytes]
    truncation: bool

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class _Tokenized:
    """Ids [N, T] of the texts of a batch, and the errors of refused ones by index."""

    ids: NDArray[np.int64]
    refused: Mapping[int, TextError]

    def rows(self, start: int, end: int) -> Outputs:
        """Return the ids of a request's texts, or raise what is wrong with them."""
        own = {index - start: error for index, error in self.refused.items() if start <= index < end}
        if own:
            raise refusal_of_rows("INPUT_TEXT", own)
        return {"INPUT_IDS": self.ids[start:end]}


class SiglipTextTokenize(BatchModel[_Texts, Outputs]):
    """INPUT_TEXT [n, 1] BYTES -> INPUT_IDS [n, T] INT64.

    The texts of all waiting requests are tokenized together, each of them once. With the parameter
    `truncation`, a text that does not fit is cut instead of refused.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        with readable_start():
            self._tokenizer = load_tokenizer(context.config)
        self._embed_models = context.settings.embed_text_models
        self._max_bytes = context.settings.max_text_bytes
        self._known = RowCache(context.settings.text_cache_rows)

    def read(self, request: Request) -> _Texts:
        """Return a request's texts."""
        request.choice("embed_model", self._embed_models)
        rows = request.strings("INPUT_TEXT")
        if not rows:
            raise InvalidInputError("INPUT_TEXT: no rows, expected at least one")
        return _Texts(rows, request.truncates())

    def compute(self, parts: Sequence[_Texts], requests: Sequence[Request]) -> _Tokenized:
        """Take known texts from the cache, and tokenize each new one once."""
        del requests  # texts have one output
        ids = np.empty((sum(map(len, parts)), self._tokenizer.context_length), dtype=np.int64)
        places: dict[bool, dict[bytes, list[int]]] = {False: {}, True: {}}
        place = 0
        for part in parts:
            new = places[part.truncation]
            for row in part.rows:
                known = self._known.get(row)
                if known is None:
                    new.setdefault(row, []).append(place)
                else:
                    ids[place] = known
                place += 1
        refused: dict[int, TextError] = {}
        for truncation, new in places.items():
            if new:
                self._tokenize(new, truncation, ids, refused)
        return _Tokenized(ids, dict(sorted(refused.items())))

    def _tokenize(
        self,
        new: Mapping[bytes, list[int]],
        truncation: bool,
        ids: NDArray[np.int64],
        refused: dict[int, TextError],
    ) -> None:
        """Write the ids, or the errors, of new texts to all their places."""
        texts: dict[bytes, str] = {}
        for row, places in new.items():
            try:
                texts[row] = decode_text(row, self._max_bytes)
            except TextError as error:
                refused.update(dict.fromkeys(places, error))
        found, errors = self._tokenizer.batch(list(texts.values()), truncation)
        for index, row in enumerate(texts):
            if index in errors:
                refused.update(dict.fromkeys(new[row], errors[index]))
                continue
            for place in new[row]:
                ids[place] = found[index]
            # Kept only if it fits: then truncation makes no difference. And only if it is short: the key is
            # the text itself.
            if not truncation and len(row) <= _LONGEST_KEY:
                self._known.put(row, found[index].copy())  # a view would keep the whole batch alive

    def finish(self, request: Request, own: Outputs) -> Outputs:  # noqa: ARG002 - there is one output
        """Return the ids."""
        return own


class SiglipTextModel(BatchModel[NDArray[np.int64], Outputs]):
    """INPUT_IDS [n, T] INT64 -> EMBEDDING [n, D].

    Texts that came before are answered from a bounded cache, so that a set of labels costs the tower
    only once in each process. With the parameter `normalized`, embeddings have unit length.
    """

    def __init__(self, context: Context) -> None:
        from siglip_serve.engine.engines import open_text

        super().__init__(context)
        config = context.config
        self._shape = tensor_dims(config)["INPUT_IDS"]
        with readable_start():
            self._engine = open_text(config, engine_plan(context))
            self._engine(np.zeros((1, *self._shape), dtype=np.int64)).rows(0, 1)
        self._vocabulary, self._width = config.text.vocab_size, config.text.projection_size
        self._known = RowCache(context.settings.text_cache_rows)
        self._buffer = RowBuffer()
        self._counter = TowerCounter(context.model)

    def read(self, request: Request) -> NDArray[np.int64]:
        """Return a request's ids, each of them in the vocabulary."""
        request.flag("normalized")
        ids = request.array("INPUT_IDS", self._shape, np.int64)
        if ids.view(np.uint64).max() >= self._vocabulary:  # or negative. On a GPU it would end the process.
            outside = np.flatnonzero(((ids < 0) | (ids >= self._vocabulary)).any(axis=1))
            raise InvalidInputError(
                f"INPUT_IDS[{outside[0]}]: an id outside the vocabulary, expected 0 to {self._vocabulary - 1}"
            )
        return ids

    def compute(self, parts: Sequence[NDArray[np.int64]], requests: Sequence[Request]) -> Batch:
        """Take known texts from the cache, and run the tower once for each new one."""
        from siglip_serve.engine.passes import Batch

        del requests  # texts have one output
        ids = self._buffer.join(parts)
        rows = np.zeros((len(ids), self._width), dtype=np.float32)
        failed = np.zeros(len(ids), dtype=np.bool_)
        new: dict[bytes, list[int]] = {}
        for place, key in enumerate([row.tobytes() for row in ids]):
            known = self._known.get(key)
            if known is None:
                new.setdefault(key, []).append(place)
            else:
                rows[place] = known
        if new:
            firsts = [places[0] for places in new.values()]
            begin = time.perf_counter()
            computed = self._engine(ids if len(firsts) == len(ids) else ids[firsts])
            self._counter.add(len(new), time.perf_counter() - begin)
            nothing = np.zeros((len(new), self._width), dtype=np.float32)
            embeddings = computed.outputs.get("EMBEDDING", nothing)
            rows[firsts], failed[firsts] = embeddings, computed.failed
            for (key, places), row, lost in zip(new.items(), embeddings, computed.failed, strict=True):
                if len(places) > 1:
                    rows[places], failed[places] = row, lost
                if not lost:
                    self._known.put(key, row.copy())  # a view would keep the whole batch alive
        return Batch({"EMBEDDING": rows}, failed)

    def finish(self, request: Request, own: Outputs) -> Outputs:
        """Keep the outputs that the request asks for."""
        return select(request, own)
