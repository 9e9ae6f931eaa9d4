"""Read a tower's parameters from a checkpoint, all of them and nothing else, without torch."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.files import main_file
from siglip_serve.checkpoint.model_config import ClipTextConfig, ClipVisionConfig, TextConfig, VisionConfig
from siglip_serve.checkpoint.tensors import Tensors
from siglip_serve.errors import CheckpointError
from siglip_serve.towers.layouts import Layout, Side, find_layout

__all__ = ["Parameters", "read_parameters", "text_shapes", "vision_shapes"]

Shapes = Mapping[str, Sequence[int]]
Values = NDArray[np.float32]

_SHOWN = 20
# Old versions of the reference saved position ids as a buffer.
_NO_INFORMATION = "position_ids"


class Parameters(Mapping[str, Values]):
    """Parameters of a tower as float32 arrays, by the names that its torch module gives them.

    Args:
        parts: the arrays that each parameter is made of. They are put below each other.
        maps: the mapped files in which the arrays may lie.
    """

    def __init__(self, parts: Mapping[str, Sequence[Values]], maps: Sequence[mmap.mmap] = ()) -> None:
        self._parts, self._maps = parts, maps

    def __getitem__(self, name: str) -> Values:
        parts = self._parts[name]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def thirds(self, name: str) -> Sequence[Values]:
        """Divide a parameter into the upper, middle and lower third of its rows, which are not copied."""
        parts = self._parts[name]
        return parts if len(parts) == 3 else np.split(self[name], 3)

    def leave_memory(self) -> None:
        """Give the pages of the mapped files back to the system. Values that are used again are read again.

        Nothing may have been written to the arrays.
        """
        for memory in self._maps:
            memory.madvise(mmap.MADV_DONTNEED)


def read_parameters(path: Path, side: Side, shapes: Shapes) -> Parameters:
    """Read a tower's parameters in float32. Where the file has float32, values stay in the mapped file.

    Args:
        path: the checkpoint's directory.
        side: which tower of the checkpoint it is.
        shapes: of all parameters, by name.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape. The first 20 are listed.
    """
    tensors = Tensors(path)
    layout = find_layout(tensors, side)
    made_of = {name: layout.parts(name, shape) for name, shape in shapes.items()}
    expected = {part.name: part.shape for parts in made_of.values() for part in parts}
    _check(path, tensors, expected, layout)
    read = {}
    for name, shape in shapes.items():
        parts = made_of[name]
        found = [tensors[part.name].read() for part in parts]
        found = [values.T if part.transposed else values for values, part in zip(found, parts, strict=True)]
        rows = [part.reshape(-1, *shape[1:]) if len(parts) > 1 else part.reshape(shape) for part in found]
        read[name] = [np.ascontiguousarray(part) for part in rows]
    return Parameters(read, tensors.maps)


def vision_shapes(config: VisionConfig) -> Shapes:
    """List the shapes of a vision tower's parameters, as SigLIP's and CLIP's towers in torch have them."""
    width, patch = config.hidden_size, config.patch_size
    if isinstance(config, ClipVisionConfig):
        return {
            "embeddings.class_embedding": [width],
            "embeddings.patch_embedding.weight": [width, 3, patch, patch],
            "embeddings.position_embedding.weight": [1 + config.grid_size**2, width],
            **_norm("pre_layrnorm", width),
            **_blocks(config),
            **_norm("post_layernorm", width),
            **_projection(config),
        }
    return {
        "embeddings.patch_embedding.weight": [width, 3, patch, patch],
        "embeddings.patch_embedding.bias": [width],
        "embeddings.position_embedding.weight": [config.grid_size**2, width],
        **_blocks(config),
        **_norm("post_layernorm", width),
        "head.probe": [1, 1, width],
        "head.attention.in_proj_weight": [3 * width, width],
        "head.attention.in_proj_bias": [3 * width],
        **_linear("head.attention.out_proj", width, width),
        **_norm("head.layernorm", width),
        **_linear("head.mlp.fc1", config.intermediate_size, width),
        **_linear("head.mlp.fc2", width, config.intermediate_size),
    }


def text_shapes(config: TextConfig) -> Shapes:
    """List the shapes of a text tower's parameters, as SigLIP's and CLIP's towers in torch have them."""
    width = config.hidden_size
    head = (
        _projection(config)
        if isinstance(config, ClipTextConfig)
        else _linear("head", config.projection_size, width)
    )
    return {
        "embeddings.token_embedding.weight": [config.vocab_size, width],
        "embeddings.position_embedding.weight": [config.max_position_embeddings, width],
        **_blocks(config),
        **_norm("final_layer_norm", width),
        **head,
    }


def _blocks(config: VisionConfig | TextConfig) -> Shapes:
    width, hidden = config.hidden_size, config.intermediate_size
    shapes: dict[str, Sequence[int]] = {}
    for index in range(config.num_hidden_layers):
        block = f"encoder.layers.{index}"
        shapes |= _norm(f"{block}.layer_norm1", width)
        shapes |= _linear(f"{block}.self_attn.qkv_proj", 3 * width, width)
        shapes |= _linear(f"{block}.self_attn.out_proj", width, width)
        shapes |= _norm(f"{block}.layer_norm2", width)
        shapes |= _linear(f"{block}.mlp.fc1", hidden, width)
        shapes |= _linear(f"{block}.mlp.fc2", width, hidden)
    return shapes


def _projection(config: ClipVisionConfig | ClipTextConfig) -> Shapes:
    if not config.projected:
        return {}
    return {"projection.weight": [config.projection_size, config.hidden_size]}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}


def _check(path: Path, tensors: Tensors, expected: Mapping[str, list[int]], layout: Layout) -> None:
    sharded = len(tensors.files) > 1
    where = {name: f" in {tensor.file}" if sharded else "" for name, tensor in tensors.items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [
        f"unexpected: {tensor.name}{where[name]}"
        for name, tensor in tensors.items()
        if name not in expected and not layout.foreign(name) and not name.endswith(_NO_INFORMATION)
    ]
    problems += [
        f"mis-shaped: {tensors[name].name}{where[name]} is {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        files = path / tensors.files[0] if not sharded else path
        raise CheckpointError(
            f"{files}: the weights are not those of its {main_file(path).name}:\n  {shown}{more}"
        )
