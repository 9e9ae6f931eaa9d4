"""Both towers at published widths against transformers, float32, random weights: the largest errors.

Errors are absolute, over the largest value of the reference. The suite's tests do the same at narrow
widths; this is for once in a while, it needs 16 GB of memory for so400m.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import SiglipConfig, SiglipModel

from benchmarks.inputs import GEOMETRIES
from benchmarks.records import about, write_csv
from benchmarks.vision_tower import scaled_error
from siglip_serve.towers.siglip import load_text, load_vision


@torch.inference_mode()
def measure(geometry: str) -> dict[str, str]:
    """One row of the table."""
    torch.manual_seed(0)
    vision = GEOMETRIES[geometry]
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = {name: vision[name] for name in shared if name in vision}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    size = model.config.vision_config.image_size
    pixels = torch.rand(1, 3, size, size) * 2 - 1
    ids = torch.randint(1000, (2, model.config.text_config.max_position_embeddings))
    expected = {"vision": model.vision_model(pixels), "text": model.text_model(ids)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        tower, text_tower = load_vision(Path(folder)), load_text(Path(folder))
    tokens, text_tokens = tower(pixels), text_tower(ids)
    got = {
        "vision_last_hidden_state": (tokens, expected["vision"].last_hidden_state),
        "vision_pooler_output": (tower.head(tokens), expected["vision"].pooler_output),
        "text_last_hidden_state": (text_tokens, expected["text"].last_hidden_state),
        "text_pooler_output": (text_tower.pool(text_tokens, ids), expected["text"].pooler_output),
    }
    errors = {name: f"{scaled_error(*pair):.1e}" for name, pair in got.items()}
    return {**about(["torch", "transformers"]), "geometry": geometry, **errors}


def main() -> None:
    """Measure, print, and write CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, nargs="+", default=list(GEOMETRIES))
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    for geometry in options.geometry:
        row = measure(geometry)
        print({key: row[key] for key in list(row)[-5:]}, flush=True)
        if options.output:
            write_csv(options.output, [row], append=True)


if __name__ == "__main__":
    main()
