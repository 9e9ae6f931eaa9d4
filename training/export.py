"""Turn a training run into a Hugging Face checkpoint folder.

    python -m training.export RUN --tokenizer spiece.model --out checkpoints/siglip-tiny
    python -m training.export RUN --vision-only --out checkpoints/siglip-tiny-jersey

The folder loads unchanged in transformers 4.57 and 5.x, as `SiglipModel` or as `SiglipVisionModel`.
"""

import json
import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from training.model import Shape

__all__ = ["export", "export_vision", "main"]

PAD = "</s>"
# The server and its clients show a checkpoint's note after its name.
NOTE = (
    "knows drawings only; for photographs serve one of Google's checkpoints: "
    "make serve CHECKPOINT=google/siglip-so400m-patch14-384"
)
NOTE_OF_JERSEYS = (
    "knows drawn jerseys only; for photographs of players serve one of Google's checkpoints: "
    "make serve TEAMS_CHECKPOINT=google/siglip-base-patch16-224"
)
COMMON = {"attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-06}


def _vision_config(shape: Shape) -> dict[str, Any]:
    return {
        **COMMON,
        "hidden_size": shape.width,
        "image_size": shape.image_size,
        "intermediate_size": 4 * shape.width,
        "model_type": "siglip_vision_model",
        "num_attention_heads": shape.heads,
        "num_channels": 3,
        "num_hidden_layers": shape.layers,
        "patch_size": shape.patch,
    }


def _config(shape: Shape) -> dict[str, Any]:
    text = {
        **COMMON,
        "hidden_size": shape.text_width,
        "intermediate_size": 4 * shape.text_width,
        "max_position_embeddings": shape.context,
        "model_type": "siglip_text_model",
        "num_attention_heads": shape.text_heads,
        "num_hidden_layers": shape.text_layers,
        "projection_size": shape.width,
        "vocab_size": shape.vocab,
        "pad_token_id": 1,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "siglip_serve_note": NOTE,
        "text_config": text,
        "torch_dtype": "float32",
        "vision_config": _vision_config(shape),
    }


def _processor(shape: Shape) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": shape.image_size, "width": shape.image_size},
    }


def _tokenizer(shape: Shape) -> dict[str, Any]:
    added = {"lstrip": True, "normalized": False, "rstrip": True, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {"1": {"content": PAD, **added}, "2": {"content": "<unk>", **added}},
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": PAD,
        "model_input_names": ["input_ids"],
        "model_max_length": shape.context,
        "pad_token": PAD,
        "processor_class": "SiglipProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "SiglipTokenizer",
        "unk_token": "<unk>",
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _weights(run: Path, out: Path) -> Shape:
    """Put the run's weights into the folder, and say its shape."""
    shape = Shape(**json.loads((run / "settings.json").read_text())["shape"])
    out.mkdir(parents=True, exist_ok=True)
    save_file(load_file(run / "model.safetensors"), out / "model.safetensors", metadata={"format": "pt"})
    return shape


def _readable(out: Path) -> None:
    """Let every user read the files: safetensors writes 0600, and a server may run as another one."""
    for path in out.iterdir():
        if path.is_file():
            path.chmod(0o644)


def export_vision(run: Path, out: Path) -> None:
    """Write the checkpoint folder of an image tower alone. Other files in `out` stay."""
    shape = _weights(run, out)
    head = {
        "architectures": ["SiglipVisionModel"],
        "siglip_serve_note": NOTE_OF_JERSEYS,
        "torch_dtype": "float32",
    }
    _write(out / "config.json", head | _vision_config(shape))
    processor = {name: value for name, value in _processor(shape).items() if name != "processor_class"}
    _write(out / "preprocessor_config.json", processor)
    _readable(out)


def export(run: Path, tokenizer: Path, out: Path) -> None:
    """Write the checkpoint folder of both towers.

    Args:
        run: folder of a training run, with `model.safetensors` and `settings.json`.
        tokenizer: the sentencepiece model it was trained with.
        out: folder to write to; other files in it stay.
    """
    shape = _weights(run, out)
    if tokenizer.resolve() != (out / "spiece.model").resolve():
        shutil.copyfile(tokenizer, out / "spiece.model")
    image_processor = _processor(shape)
    _write(out / "config.json", _config(shape))
    _write(out / "preprocessor_config.json", image_processor)
    nested = {name: value for name, value in image_processor.items() if name != "processor_class"}
    _write(out / "processor_config.json", {"image_processor": nested, "processor_class": "SiglipProcessor"})
    _write(out / "tokenizer_config.json", _tokenizer(shape))
    special = {"content": PAD, "lstrip": True, "normalized": False, "rstrip": True, "single_word": False}
    tokens = {"eos_token": special, "pad_token": special, "unk_token": {**special, "content": "<unk>"}}
    _write(out / "special_tokens_map.json", tokens)
    _readable(out)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that training.train or .train_jerseys wrote")
    parser.add_argument("--tokenizer", type=Path, default=Path("checkpoints/siglip-tiny/spiece.model"))
    parser.add_argument("--out", type=Path, default=Path("checkpoints/siglip-tiny"))
    parser.add_argument("--vision-only", action="store_true", help="the run has no text tower")
    args = parser.parse_args(argv)
    if args.vision_only:
        export_vision(args.run, args.out)
    else:
        export(args.run, args.tokenizer, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
