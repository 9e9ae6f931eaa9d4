"""Answer the models of texts: texts become token ids, ids become embeddings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.config import tensor_dims
from siglip_serve.errors import InvalidInputError
from siglip_serve.serving.context import Context, engine_plan, readable_start
from siglip_serve.serving.counters import TowerCounter
from siglip_serve.serving.request import Request
from siglip_serve.serving.respond import BatchModel, Outputs, RequestModel, select
from siglip_serve.serving.rows import Row, RowBuffer, RowCache, map_rows
from siglip_serve.texts.tokenizer import decode_text, load_tokenizer

if TYPE_CHECKING:
    from siglip_serve.engine.passes import Batch

__all__ = ["SiglipTextModel", "SiglipTextTokenize"]

_LONGEST_KEY = 1024


class SiglipTextTokenize(RequestModel):
    """INPUT_TEXT [n, 1] BYTES -> INPUT_IDS [n, T] INT64.

    With the parameter `truncation`, a text that does not fit is cut instead of refused.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        with readable_start():
            self._tokenizer = load_tokenizer(context.config)
        self._embed_models = context.settings.embed_text_models
        self._max_bytes = context.settings.max_text_bytes
        self._known = RowCache(context.settings.text_cache_rows)

    def answer(self, request: Request) -> Outputs:
        """Tokenize the texts of a request."""
        request.choice("embed_model", self._embed_models)
        truncation = request.truncates()

        def ids(row: bytes) -> Row:
            # Kept only if it fits: then truncation makes no difference. And only if it is short: the key
            # is the text itself.
            known = self._known.get(row)
            if known is None:
                known = self._tokenizer(decode_text(row, self._max_bytes), truncation)
                if not truncation and len(row) <= _LONGEST_KEY:
                    self._known.put(row, known)
            return known

        return {"INPUT_IDS": map_rows("INPUT_TEXT", request.strings("INPUT_TEXT"), ids)}


class SiglipTextModel(BatchModel[NDArray[np.int64], Outputs]):
    """INPUT_IDS [n, T] INT64 -> EMBEDDING [n, D].

    Texts that came before are answered from a bounded cache, so that a set of labels costs the tower
    only once. With the parameter `normalized`, embeddings have unit length.
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
        outside = np.flatnonzero(((ids < 0) | (ids >= self._vocabulary)).any(axis=1))
        if len(outside):  # on a GPU it would end the process
            raise InvalidInputError(
                f"INPUT_IDS[{outside[0]}]: an id outside the vocabulary, expected 0 to {self._vocabulary - 1}"
            )
        return ids

    def compute(self, parts: Sequence[NDArray[np.int64]], requests: Sequence[Request]) -> Batch:
        """Take known texts from the cache, and run the tower once for each new one."""
        from siglip_serve.engine.passes import Batch

        del requests  # texts have one output
        ids = self._buffer.join(parts)
        keys = [row.tobytes() for row in ids]
        rows = {key: row for key in keys if (row := self._known.get(key)) is not None}
        new = {key: index for index, key in enumerate(keys) if key not in rows}
        lost: set[bytes] = set()
        if new:
            begin = time.perf_counter()
            computed = self._engine(ids[list(new.values())])
            self._counter.add(len(new), time.perf_counter() - begin)
            nothing = np.zeros((len(new), self._width), dtype=np.float32)
            embeddings = computed.outputs.get("EMBEDDING", nothing)
            for key, row, failed in zip(new, embeddings, computed.failed, strict=True):
                rows[key] = row
                if failed:
                    lost.add(key)
                else:
                    self._known.put(key, row.copy())  # a view would keep the whole batch alive
        return Batch(
            {"EMBEDDING": np.stack([rows[key] for key in keys])},
            np.array([key in lost for key in keys]),
        )

    def finish(self, request: Request, own: Outputs) -> Outputs:
        """Keep the outputs that the request asks for."""
        return select(request, own)
