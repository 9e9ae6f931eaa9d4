"""Writes a checkpoint with random weights at a published geometry: for speed, which does not depend on them.

The vision tower is of full size, and the tokenizer is that of the bundled checkpoint. The text tower is small
unless `--full-text` asks for the published one, with the bundled vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import SiglipConfig, SiglipModel

from benchmarks.inputs import GEOMETRIES

_BUNDLED = Path(__file__).parents[1] / "checkpoints" / "siglip-tiny"
_TOKENIZER = ("spiece.model", "tokenizer_config.json", "special_tokens_map.json")
_BICUBIC = 3
_SMALL_TEXT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def main() -> None:
    """Write the checkpoint in the Hugging Face layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="base/16@224", help="default %(default)s")
    parser.add_argument("--full-text", action="store_true", help="text tower as wide as the vision tower")
    options = parser.parse_args()
    bundled = json.loads((_BUNDLED / "config.json").read_text(encoding="utf-8"))
    vision = GEOMETRIES[options.geometry]
    config = SiglipConfig(vision_config=vision)
    text = {
        **{name: vision[name] if options.full_text else small for name, small in _SMALL_TEXT.items()},
        "vocab_size": bundled["text_config"]["vocab_size"],
        "projection_size": config.vision_config.hidden_size,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(options.output)
    for name in _TOKENIZER:
        shutil.copy(_BUNDLED / name, options.output / name)
    size = config.vision_config.image_size
    picture = {"size": {"height": size, "width": size}, "resample": _BICUBIC}
    (options.output / "preprocessor_config.json").write_text(json.dumps(picture), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
