"""Ask a server of embeddings for texts and pictures, and tell what it does wrong.

    python -m validate.conformance http://127.0.0.1:8080 --api openai --checkpoint checkpoints/siglip-tiny

Each line is a verdict with its evidence: `ok`, `fault`, or `unseen` where the checkpoint or the answers
cannot tell. The exit status is 0 without a fault, 1 with one, and 2 if the server could not be judged.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from validate.conformance.check import check_server
from validate.conformance.dialects import APIS, Endpoint
from validate.conformance.towers import Towers
from validate.conformance.verdicts import Verdict
from validate.errors import ValidationError

__all__ = ["main"]

_KINDS = ("text", "picture")
_OWN = ("date", "device", "server", "api", "checkpoint")
_COLUMNS = (*_OWN, "kind", "check", "status", "reference", "explained", "evidence")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 no fault, 1 a fault, 2 the server could not be judged, 130 stopped."""
    options = _parser().parse_args(arguments)
    try:
        endpoint = Endpoint(
            options.url,
            options.api,
            options.model,
            options.timeout,
            dict(_header(text) for text in options.header),
            options.extra,
        )
        towers = Towers(options.checkpoint, options.device)
        found = check_server(endpoint, towers, options.tolerance, options.only)
    except ValidationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps([asdict(verdict) for verdict in found], indent=1))
    else:
        _print(found)
    if options.csv:
        _append(options.csv, found, options)
    return int(any(verdict.status == "fault" for verdict in found))


def _print(found: Sequence[Verdict]) -> None:
    for verdict in found:
        print(f"{verdict.status:<7} {verdict.kind:<8} {verdict.check:<15} {verdict.evidence}")
    count = {
        status: sum(verdict.status == status for verdict in found) for status in ("ok", "fault", "unseen")
    }
    print(", ".join(f"{number} {status}" for status, number in count.items()))


def _append(path: Path, found: Sequence[Verdict], options: argparse.Namespace) -> None:
    """Add the verdicts to a CSV file, in place of those of the same server, API and checkpoint."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = (today, _processor(), options.label or options.url, options.api, Path(options.checkpoint).name)
    own = dict(zip(_OWN, about, strict=True))
    kept: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            kept = list(csv.DictReader(file))
    kept = [row for row in kept if any(row[name] != own[name] for name in _OWN[2:])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *({**own, **_row(verdict)} for verdict in found)])


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _row(verdict: Verdict) -> dict[str, str]:
    values = {name: getattr(verdict, name) for name in ("reference", "explained")}
    return {
        "kind": verdict.kind,
        "check": verdict.check,
        "status": verdict.status,
        **{name: "" if value is None else f"{value:.6f}" for name, value in values.items()},
        "evidence": verdict.evidence,
    }


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ValidationError(f"--header: got {text!r}, expected NAME: VALUE")
    return name.strip(), value.strip()


def _object(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"got {text}, expected a JSON object")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m validate.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("url", metavar="URL", help="of the server, such as http://127.0.0.1:8080")
    add("--api", choices=APIS, required=True, help="how it is asked")
    add("--checkpoint", required=True, help="what it serves: a directory or owner/name[@revision]")
    add("--model", default="any", help="name that requests carry (default: %(default)s)")
    add("--header", action="append", default=[], metavar="NAME: VALUE", help="further header, such as a key")
    add("--extra", type=_object, default={}, metavar="JSON", help="further fields of JSON requests")
    add("--timeout", type=float, default=60.0, help="seconds per request (default: %(default)s)")
    add(
        "--tolerance",
        type=float,
        default=0.999,
        help="smallest cosine of equal vectors; lower it for int8 (default: %(default)s)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the checkpoint runs")
    add("--only", nargs="+", choices=_KINDS, default=_KINDS, help="what is sent (default: both)")
    add("--json", action="store_true", help="print the verdicts as JSON")
    add("--csv", type=Path, help="file that the verdicts are added to")
    add("--label", default="", help="name of the server in that file (default: its URL)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
