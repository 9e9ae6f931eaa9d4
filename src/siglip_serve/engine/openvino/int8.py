"""The vision tower in int8, quantised after training on the operator's own images and kept on disk.

Weights and activations of the blocks become int8 (NNCF, transformer preset). Attention's softmax, the norms
and the pooling head do not. Calibration takes minutes, so its result is kept in a file, whose name is a
digest of everything that it depends on.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.engine.calibration import FEWEST_IMAGES, calibration_files, require_nncf, too_few
from siglip_serve.engine.openvino.compiled import Compiled
from siglip_serve.engine.openvino.graph import build_head, build_vision
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import ImageError, ImageTooLargeError
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.machine import processor_flags
from siglip_serve.towers.load import AnyVisionTower

__all__ = ["quantize"]

_HELD_OUT = 10  # one image in ten is not calibrated on, but measures how close the result is
_FORMAT = "2"
_XML, _BIN, _FIDELITY = "tower.xml", "tower.bin", "fidelity.txt"

Pixels = NDArray[np.uint8]


def quantize(tower: AnyVisionTower, image: ImageConfig, plan: Plan) -> ov.Model:
    """Quantise the graph of `build_vision`, or load it from the cache, and print how close it is to float32.

    Args:
        tower: on the CPU, float32.
        image: the checkpoint's preprocessing of the calibration images.
        plan: resolved, of dtype int8, for its folders `calibration` and `cache`.

    Raises:
        SettingsError: there are fewer than 10 images to calibrate on, or nncf is not installed.
    """
    files = calibration_files(plan.calibration)
    cached = plan.cache / f"{_key(tower, image, files)}.zip" if plan.cache else None
    with _any_character():
        found = _load(cached) if cached else None
        if found is None:
            model, fidelity = _calibrate(tower, image, plan, files)
            if cached:
                _store(model, fidelity, cached)
        else:
            model, fidelity = found
    print(f"siglip-serve: int8 against float32: {fidelity}", flush=True)
    return model


@contextmanager
def _any_character() -> Iterator[None]:
    """Let standard output take every character for a while.

    In the locale C it takes ASCII only. The progress bar of nncf, or a file name in a message, would then
    end the start.
    """
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    encoding, errors = stream.encoding, stream.errors
    stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(encoding=encoding, errors=errors)


def _key(tower: AnyVisionTower, image: ImageConfig, files: Sequence[Path]) -> str:
    """Digest the weights, the images, the software and the processor."""
    digest = hashlib.sha256()
    core = ov.Core()
    processor = [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    # Without nncf's version: a kept model can be served where nncf is not installed.
    digest.update(repr([_FORMAT, ov.__version__, *processor, tower.config, image]).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().data)
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return f"int8-{digest.hexdigest()[:32]}"


def _calibrate(
    tower: AnyVisionTower, image: ImageConfig, plan: Plan, files: Sequence[Path]
) -> tuple[ov.Model, str]:
    require_nncf()
    # Set before nncf is imported, which would report its use over the network.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    images = list(_read(files, image))
    if len(images) < FEWEST_IMAGES:
        raise too_few(plan.calibration, len(images))
    held = images[::_HELD_OUT]
    shown = [pixels for index, pixels in enumerate(images) if index % _HELD_OUT]
    print(
        f"siglip-serve: calibrating int8 on {len(shown)} images of {plan.calibration}: some minutes, once",
        flush=True,
    )
    # Processors without these instructions add pairs of products in 16 bits, which overflow unless the
    # weights take 7 bits: on a narrow tower the cosine was 0.966 instead of 0.99.
    exact = not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(processor_flags())
    overflow = nncf.OverflowFix.FIRST_LAYER if exact else nncf.OverflowFix.ENABLE
    model = nncf.quantize(
        build_vision(tower, image),
        nncf.Dataset(shown),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(shown),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
    )
    return model, _fidelity(model, tower, image, held, plan)


def _read(files: Sequence[Path], image: ImageConfig) -> Iterator[Pixels]:
    preprocess = Preprocessor(image, "pil")
    for file in files:
        try:
            yield preprocess(file.read_bytes())[None]
        except (ImageError, ImageTooLargeError) as error:
            print(f"siglip-serve: not calibrated on {file}: {error}", flush=True)


def _fidelity(
    model: ov.Model, tower: AnyVisionTower, image: ImageConfig, held: Sequence[Pixels], plan: Plan
) -> str:
    """Compare the pooled embeddings with those in float32 by their cosine."""
    exact = replace(plan, dtype="float32")
    ways = [
        (Compiled(model, plan), Compiled(build_head(tower), plan)),
        (Compiled(build_vision(tower, image), exact), Compiled(build_head(tower), exact)),
    ]
    ours, theirs = (np.concatenate([head(tower(pixels)) for pixels in held]) for tower, head in ways)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return f"cosine {cosine.mean():.4f} on average, {cosine.min():.4f} at least, {len(held)} images held out"


def _load(file: Path) -> tuple[ov.Model, str] | None:
    """Read a file that `_store` wrote, or return None if it cannot be used. The model is then made again."""
    if not file.exists():
        return None
    try:
        with zipfile.ZipFile(file) as archive:  # its checksums reveal a damaged file
            xml, weights = archive.read(_XML), archive.read(_BIN)
            fidelity = archive.read(_FIDELITY).decode()
        tensor = ov.Tensor(np.frombuffer(weights, dtype=np.uint8))
        return ov.Core().read_model(xml, tensor), fidelity
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RuntimeError, EOFError) as error:
        print(f"siglip-serve: {file} cannot be used and is made again: {error}", flush=True)
        return None


def _store(model: ov.Model, fidelity: str, file: Path) -> None:
    """Write a new file and rename it, so that several processes can start at once."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".int8-", dir=file.parent) as folder:
            ov.save_model(model, Path(folder) / _XML, compress_to_fp16=False)
            whole = Path(folder) / file.name
            with zipfile.ZipFile(whole, "w") as archive:
                archive.write(Path(folder) / _XML, _XML)
                archive.write(Path(folder) / _BIN, _BIN)
                archive.writestr(_FIDELITY, fidelity)
            whole.replace(file)
    except (OSError, RuntimeError) as error:
        print(f"siglip-serve: the int8 model is not kept, {file} cannot be written: {error}", flush=True)
