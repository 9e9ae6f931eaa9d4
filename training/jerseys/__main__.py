"""Write a drawn clip as a folder of crops, to try the teams without footage.

    python -m training.jerseys T3 crops --seed 1

Files are named after frame and track, which `siglip-serve teams crops --track-from-name 'track(\\d+)'`
understands. `crops.truth.csv` beside the folder says team and role of each.
"""

import csv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from training.jerseys.clips import TIERS, Role, clip, contact_sheet


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "tier", choices=list(TIERS), help="its difficulty, T1 to T8: see training/jerseys/clips.py"
    )
    parser.add_argument("out", type=Path, help="folder to write to; made if it is not there")
    parser.add_argument("--seed", type=int, default=0, help="of every choice (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, help="PNG file of all crops, one row per track")
    args = parser.parse_args(argv)

    made = clip(args.tier, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, data in enumerate(made.crops):
        name = f"frame{made.frame[index]:02d}_track{made.track[index]:02d}.jpg"
        (args.out / name).write_bytes(data)
        rows.append((name, made.team[index], Role(made.role[index]).name.lower()))
    truth = args.out.with_name(f"{args.out.name}.truth.csv")
    with truth.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("file", "team", "role"), *rows])
    if args.sheet:
        contact_sheet(made).save(args.sheet)
    print(f"wrote {len(rows)} crops to {args.out}, and {truth}")


if __name__ == "__main__":
    main()
