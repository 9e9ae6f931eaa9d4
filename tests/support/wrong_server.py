"""An embedding server in this process that makes one chosen mistake, over OpenAI's API.

It uses transformers as such servers do, and nothing of the program that looks for the mistakes.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

__all__ = ["MISTAKES", "Model", "wrong_server"]

Floats: TypeAlias = NDArray[np.float32]
_TEXTS, _PICTURES, _BOTH = ("text",), ("picture",), ("text", "picture")
# Each with the inputs that it concerns, the check that should find it, and words of its evidence.
MISTAKES: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "unpadded": (_TEXTS, "padding", "not padded to the full length"),
    "padded before": (_TEXTS, "padding", "padding stands before the text"),
    "padded with zeros": (_TEXTS, "padding", "padding is token 0"),
    "masked": (_TEXTS, "padding mask", "padding is masked"),
    "capitals": (_TEXTS, "case", "capitals are kept"),
    "punctuation": (_TEXTS, "punctuation", "punctuation is kept"),
    "special tokens": (_TEXTS, "special tokens", "read as text"),
    "20 tokens": (_TEXTS, "length limit", "cut to 20 tokens"),
    "no end": (_TEXTS, "end token", "loses its end token"),
    "prompt": (_TEXTS, "prompt", "a photo of a {}."),
    "mean": (_TEXTS, "pooling", "mean of all tokens"),
    "no exif": (_PICTURES, "EXIF", "ignored"),
    "cropped": (_PICTURES, "aspect", "centre is cut out"),
    "bars": (_PICTURES, "aspect", "bars"),
    "bgr": (_PICTURES, "colour order", "swapped"),
    "imagenet": (_PICTURES, "pixel scale", "ImageNet"),
    "bytes": (_PICTURES, "pixel scale", "0 to 255"),
    "black": (_PICTURES, "transparency", "on black"),
    "stored": (_PICTURES, "transparency", "dropped"),
    "indices": (_PICTURES, "palette", "indices"),
    "inverted": (_PICTURES, "CMYK", "inverted"),
    "nearest": (_PICTURES, "resize", "nearest"),
    "reversed": (_TEXTS, "batch", "mixed up"),
    "averaged": (_TEXTS, "batch", "depend on the other inputs"),
    "scaled": (_BOTH, "length", "text: 1, picture: those of the tower"),
    "no palettes": (_PICTURES, "answers", "palette"),
    "another": (_TEXTS, "vectors", "no known fault explains"),
}


class Model:
    """A checkpoint in transformers, from which vectors are computed rightly but for one mistake."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self._model = AutoModel.from_pretrained(checkpoint).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self._processor: Any = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        self._length = self._model.config.text_config.max_position_embeddings

    def texts(self, texts: list[str], mistake: str) -> Floats:
        """Vectors [N, D] of the length 1."""
        tokenizer, options = self._tokenizer, {"padding": "max_length", "truncation": True}
        tokenizer.do_lower_case = mistake != "capitals"
        tokenizer.padding_side = "left" if mistake == "padded before" else "right"
        tokenizer.__dict__.pop("remove_punctuation", None)
        if mistake == "punctuation":
            tokenizer.remove_punctuation = lambda text: text
        if mistake == "special tokens":
            options["split_special_tokens"] = True
        if mistake == "unpadded":
            options["padding"] = True
        if mistake == "prompt":
            texts = [f"a photo of a {text}." for text in texts]
        found = tokenizer(texts, return_tensors="pt", max_length=self._length, **options)
        if mistake == "20 tokens":
            found = tokenizer(texts, truncation=True, max_length=20)
            found = tokenizer.pad(found, padding="max_length", max_length=self._length, return_tensors="pt")
        ids = found["input_ids"]
        mask = (torch.cumsum(ids.flip(1) != 1, 1).flip(1) > 0).long()
        mask = torch.cat([torch.ones(len(ids), 1, dtype=torch.long), mask[:, :-1]], 1)  # with the end token
        if mistake == "padded with zeros":
            ids = torch.where(mask > 0, ids, 0)
        if mistake == "no end":
            whole = [tokenizer(text)["input_ids"][: self._length] for text in texts]
            ids = torch.tensor([row + [1] * (self._length - len(row)) for row in whole])
        with torch.inference_mode():
            if mistake == "mean":
                states = self._model.text_model(input_ids=ids).last_hidden_state.mean(1)
                return unit(self._model.text_model.head(states).numpy())
            more = {"attention_mask": mask} if mistake == "masked" else {}
            return unit(self._model.get_text_features(input_ids=ids, **more).pooler_output.numpy())

    def pictures(self, files: list[bytes], mistake: str) -> Floats:
        """Vectors [N, D] of the length 1."""
        options: dict[str, Any] = {}
        if mistake == "imagenet":
            options = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        if mistake == "bytes":
            options = {"do_rescale": False, "do_normalize": False}
        if mistake == "nearest":
            options = {"resample": Image.Resampling.NEAREST}
        images = [self._image(data, mistake) for data in files]
        pixels = self._processor(images=images, return_tensors="pt", **options)["pixel_values"]
        with torch.inference_mode():
            found = self._model.get_image_features(pixel_values=pixels).pooler_output.numpy()
        return found if mistake == "scaled" else unit(found)

    def _image(self, data: bytes, mistake: str) -> Image.Image:
        image: Image.Image = Image.open(io.BytesIO(data))
        if mistake == "no palettes" and image.mode == "P":
            raise ValueError("image mode P is not supported")
        if mistake != "no exif":
            image = ImageOps.exif_transpose(image)
        if mistake == "indices" and image.mode == "P":
            image = Image.fromarray(np.array(image), "L")
        if mistake == "inverted" and image.mode == "CMYK":
            image = Image.fromarray(255 - np.asarray(image), "CMYK")
        if mistake == "stored":
            image = image.convert("RGBA").convert("RGB")
        if image.mode == "RGBA" or "transparency" in image.info:
            layer = image.convert("RGBA")
            image = Image.new("RGB", image.size, "black" if mistake == "black" else "white")
            image.paste(layer, mask=layer.getchannel("A"))
        image = image.convert("RGB")
        side = self._processor.size["height"]
        if mistake == "cropped":
            left, top = (image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2
            box = (left, top, left + min(image.size), top + min(image.size))
            image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
        if mistake == "bars":
            whole = Image.new("RGB", (side, side))
            image.thumbnail((side, side))
            scale = side / max(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)))
            whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = whole
        return Image.fromarray(np.asarray(image)[..., ::-1].copy()) if mistake == "bgr" else image


def unit(rows: Floats) -> Floats:
    """Rows of the length 1."""
    scaled: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


@contextmanager
def wrong_server(model: Model, mistake: str = "") -> Iterator[str]:
    """Serve `/v1/embeddings` with a mistake of `MISTAKES`, or with none: the server's URL."""
    lock = threading.Lock()

    def vectors(inputs: list[str]) -> Floats:
        if inputs[0].startswith("data:"):
            files = [base64.b64decode(text.partition(",")[2]) for text in inputs]
            rows = model.pictures(files, mistake)
        else:
            rows = model.texts(inputs, mistake)
        if mistake == "reversed":
            return rows[::-1]
        if mistake == "another":
            return np.roll(rows, 1, axis=1)
        return unit(rows + rows.mean(0)) if mistake == "averaged" else rows

    with _http(lambda body: _answer(lock, vectors, body)) as url:
        yield url


def _answer(
    lock: threading.Lock, vectors: Callable[[list[str]], Floats], body: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    try:
        with lock:
            rows = vectors(body["input"])
    except ValueError as error:
        return 500, {"error": str(error)}
    return 200, {
        "data": [{"index": index, "embedding": row.tolist()} for index, row in enumerate(rows)],
    }


@contextmanager
def _http(answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            status, found = answer(json.loads(self.rfile.read(length)))
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
