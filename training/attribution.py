"""Write who drew the training art, under which licence: a table that ships with the checkpoint.

python -m training.attribution --out checkpoints/siglip-tiny/ATTRIBUTION.md
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.pack import Pack, load_pack
from training.sources import collections

__all__ = ["main", "table"]

_FONT_AUTHORS = {
    "noto-mono-300": ("Noto Emoji (font)", "Google", "https://github.com/googlefonts/noto-emoji"),
    "noto-mono-500": ("Noto Emoji (font)", "Google", "https://github.com/googlefonts/noto-emoji"),
    "noto-mono-700": ("Noto Emoji (font)", "Google", "https://github.com/googlefonts/noto-emoji"),
    "noto-symbols": ("Noto Sans Symbols, Symbols 2", "Google", "https://github.com/notofonts/symbols"),
    "symbola": ("Symbola", "George Douros", ""),
    "unifont": ("GNU Unifont", "Roman Czyborra, Paul Hardy and others", "https://unifoundry.com/unifont/"),
}


def _row(style: dict[str, Any], sets: dict[str, Any], drawings: int) -> str:
    if style["kind"] == "font":
        name, author, url = _FONT_AUTHORS[style["name"]]
    else:
        info = sets[style["where"]]
        name, author, url = info["name"], info["author"]["name"], info["author"].get("url", "")
    linked = f"[{name}]({url})" if url else name
    return f"| {linked} | {author} | {style['licence']} | {drawings} |"


def table(pack: Pack, sets: dict[str, Any]) -> str:
    """Markdown table of every style that training shows, most drawings first."""
    shown = Counter(int(style) for style in pack.style[pack.of_role("train")])
    rows = [_row(pack.styles[style], sets, count) for style, count in shown.most_common()]
    return "\n".join(["| set | author | licence | drawings |", "|---|---|---|---|", *rows]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=Path(".cache/art.npz"), help="what build_data wrote")
    parser.add_argument("--cache", type=Path, default=Path(".cache/art"), help="packages that it fetched")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args(argv)
    heading = (
        "# Art that the weights were trained on\n\n"
        "No drawing is part of the checkpoint. Drawings were rendered at 96 pixels and recoloured, bent and\n"
        "relit for training. The sets are used as their packages license them:\n\n"
    )
    args.out.write_text(heading + table(load_pack(args.pack), collections(args.cache)))


if __name__ == "__main__":
    main()
