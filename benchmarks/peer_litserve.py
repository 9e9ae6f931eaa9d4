"""A peer: SigLIP embeddings by transformers behind LitServe, which forms the batches.

`POST /predict` takes `{"input": [text]}`, or `{"input": [base64], "modality": "image"}` with a data URI or
bare base64, and answers with `{"data": [{"embedding": base64 of float32}]}`. LitServe decodes the requests of
a batch one after the other, so that images are decoded in threads as part of the batch instead.
"""

# Without `annotations` of `__future__`: LitServe looks at the types of a request and of an answer.
import base64
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import litserve  # type: ignore[import-not-found]
import numpy as np
import torch
from fastapi import Request
from numpy.typing import NDArray

from benchmarks.peer_model import TransformersModel, server_parser

__all__ = ["SiglipApi"]


class SiglipApi(litserve.LitAPI):  # type: ignore[misc]
    """Embeddings of batches of images and texts."""

    def __init__(self, checkpoint: Path, dtype: str, batch: int, wait: float) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=wait)
        self._checkpoint, self._dtype = checkpoint, dtype

    def setup(self, device: str) -> None:
        """Load the model, in the process that computes."""
        self._model = TransformersModel(self._checkpoint, device, self._dtype)
        self._decoders = ThreadPoolExecutor(os.cpu_count(), "decode", torch.set_num_threads, (1,))

    def decode_request(self, request: Request) -> str | bytes:
        """Return a text, or the bytes of an image."""
        content: Mapping[str, Any] = request  # LitServe has read its JSON
        (value,) = content["input"]
        if content.get("modality") != "image":
            return str(value)
        return base64.b64decode(value.rpartition(",")[2])

    def predict(self, inputs: Sequence[str | bytes]) -> list[NDArray[np.float32]]:
        """Embed a batch."""
        rows: dict[int, NDArray[np.float32]] = {}
        images = {n: value for n, value in enumerate(inputs) if isinstance(value, bytes)}
        if images:
            pixels = torch.cat(list(self._decoders.map(self._pixels, images.values())))
            rows.update(zip(images, self._model.embed_pixels(pixels), strict=True))
        texts = {n: value for n, value in enumerate(inputs) if isinstance(value, str)}
        if texts:
            rows.update(zip(texts, self._model.embed_texts(list(texts.values())), strict=True))
        return [rows[n] for n in range(len(inputs))]

    def encode_response(self, output: NDArray[np.float32]) -> Any:
        """Write a row as base64, which costs far less than numbers as text."""
        return {"data": [{"embedding": base64.b64encode(output.tobytes()).decode("ascii")}]}

    def _pixels(self, data: bytes) -> torch.Tensor:
        return self._model.pixels([self._model.decode(data)])


def main() -> None:
    """Serve until a signal."""
    options = server_parser(__doc__, port=8000).parse_args()
    api = SiglipApi(options.checkpoint, options.dtype, options.batch, options.wait)
    server = litserve.LitServer(api, accelerator=options.device, fast_queue=True)
    server.run(
        host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning", access_log=False
    )


if __name__ == "__main__":
    main()
