"""Sources of the art and the names, their licences, and what each set may be used for.

A drawing style belongs to a vendor family. Families are split as a whole: nothing of a held-out family is
trained on, because one vendor's styles share their drawings.
"""

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fontTools.ttLib import TTFont

__all__ = [
    "NPM_PACKAGES",
    "STYLES",
    "Role",
    "Style",
    "collections",
    "fetch",
    "icon_styles",
    "verify_licences",
]

Role = Literal["train", "held-out", "choose"]
Kind = Literal["iconify", "webp", "font", "icons"]

NPM_PACKAGES = {
    "iconify": "@iconify/json@2.2.535",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto-font": "@fontsource/noto-emoji@5.3.2",
    "emojibase": "emojibase-data@17.0.0",
}
DEBIAN_PACKAGES = ("fonts-symbola", "fonts-unifont", "fonts-noto-core")

ALLOWED = {
    "MIT",
    "Apache-2.0",
    "CC-BY-4.0",
    "CC-BY-3.0",
    "CC0-1.0",
    "OFL-1.1",
    "ISC",
    "BSD-3-Clause",
    "Unlicense",
}
# Microsoft's icon sets are of the family of Fluent Emoji; EmojiOne v1 and OpenMoji are share-alike.
HELD_OUT_ICON_PREFIXES = ("fluent", "twemoji", "openmoji", "emojione-v1")


@dataclass(frozen=True)
class Style:
    """One way of drawing.

    `where` is an Iconify prefix, or a glob of font or image files below the cache directory.
    `mono` says that the drawing carries shape only, so that any ink may be given to it.
    """

    name: str
    family: str
    role: Role
    licence: str
    kind: Kind
    where: str
    mono: bool = False


_FONTSOURCE = "noto-font/files/noto-emoji-emoji-{}-normal.woff2"
_FONTS = "usr/share/fonts"

STYLES: tuple[Style, ...] = (
    Style("noto", "google", "train", "Apache-2.0", "iconify", "noto"),
    Style("noto-v1", "google", "train", "Apache-2.0", "iconify", "noto-v1"),
    Style("noto-mono-300", "google", "train", "OFL-1.1", "font", _FONTSOURCE.format(300), mono=True),
    Style("noto-mono-500", "google", "train", "OFL-1.1", "font", _FONTSOURCE.format(500), mono=True),
    Style("noto-mono-700", "google", "train", "OFL-1.1", "font", _FONTSOURCE.format(700), mono=True),
    Style(
        "noto-symbols",
        "google",
        "train",
        "OFL-1.1",
        "font",
        f"{_FONTS}/truetype/noto/NotoSansSymbols*-Regular.ttf",
        mono=True,
    ),
    Style("emojione", "emojione", "train", "CC-BY-4.0", "iconify", "emojione"),
    Style("emojione-monotone", "emojione", "train", "CC-BY-4.0", "iconify", "emojione-monotone", mono=True),
    Style("streamline", "streamline", "train", "CC-BY-4.0", "iconify", "streamline-emojis"),
    Style("fxemoji", "mozilla", "train", "Apache-2.0", "iconify", "fxemoji"),
    Style("dinkie", "dinkie", "train", "MIT", "iconify", "dinkie-icons", mono=True),
    Style(
        "symbola",
        "symbola",
        "train",
        "free for any use",
        "font",
        f"{_FONTS}/truetype/ancient-scripts/Symbola_hint.ttf",
        mono=True,
    ),
    Style(
        "unifont", "unifont", "train", "OFL-1.1", "font", f"{_FONTS}/opentype/unifont/unifont*.otf", mono=True
    ),
    Style("twemoji", "twitter", "held-out", "CC-BY-4.0", "iconify", "twemoji"),
    Style("fluent-flat", "microsoft", "held-out", "MIT", "iconify", "fluent-emoji-flat"),
    Style("fluent-color", "microsoft", "held-out", "MIT", "iconify", "fluent-emoji"),
    Style("fluent-3d", "microsoft", "held-out", "MIT", "webp", "fluent-3d/assets/*.webp"),
    Style(
        "fluent-contrast", "microsoft", "held-out", "MIT", "iconify", "fluent-emoji-high-contrast", mono=True
    ),
    Style("openmoji", "openmoji", "choose", "CC-BY-SA-4.0", "iconify", "openmoji"),
)


def _npm(spec: str, target: Path) -> None:
    """Fetch one npm package as its tarball and unpack it, without running anything that it carries."""
    download = target.parent / "tarballs"
    download.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", str(download), spec],
        check=True,
        capture_output=True,
        text=True,
    )
    archive = download / done.stdout.strip().splitlines()[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    inner = next(path for path in target.iterdir() if path.is_dir())
    for path in list(inner.iterdir()):
        path.rename(target / path.name)
    inner.rmdir()
    archive.unlink()


def fetch(cache: Path) -> None:
    """Fill `cache` with every package: one folder a npm package, and the Debian fonts below `usr/`.

    Raises:
        subprocess.CalledProcessError: `npm`, `apt-get` or `dpkg-deb` failed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for name, spec in NPM_PACKAGES.items():
        if not (cache / name / "package.json").exists():
            _npm(spec, cache / name)
    debs = cache / "debs"
    debs.mkdir(exist_ok=True)
    for name in DEBIAN_PACKAGES:
        if not list(debs.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", "-q", name], cwd=debs, check=True, capture_output=True)
        archive = next(debs.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(cache)], check=True)


def collections(cache: Path) -> dict[str, Any]:
    """Iconify's own list of its sets: prefix -> name, author, licence."""
    found: dict[str, Any] = json.loads((cache / "iconify/collections.json").read_text())
    return found


def icon_styles(cache: Path) -> list[Style]:
    """The plain icon sets that may be trained on, one style and family each."""
    known = {style.where for style in STYLES}
    styles = []
    for prefix, info in sorted(collections(cache).items()):
        licence = info["license"].get("spdx", "")
        if prefix in known or prefix.startswith(HELD_OUT_ICON_PREFIXES) or licence not in ALLOWED:
            continue
        mono = not info.get("palette", False)
        styles.append(Style(f"icons-{prefix}", prefix, "train", licence, "icons", prefix, mono))
    return styles


def _font_licence(path: Path) -> str:
    """The licence in a font's own name table."""
    font = TTFont(path, lazy=True)
    said = " ".join(str(record) for record in font["name"].names if record.nameID in (0, 13, 14))
    if "Open Font License" in said or "scripts.sil.org/OFL" in said:
        return "OFL-1.1"
    return "free for any use" if "free for any use" in said else said[:80]


def _stated_licence(cache: Path, style: Style, sets: dict[str, Any]) -> str:
    """The licence in the package's own files."""
    if style.kind in ("iconify", "icons"):
        licence: str = sets[style.where]["license"].get("spdx", "")
        return licence
    if style.kind == "font":
        found = {_font_licence(path) for path in cache.glob(style.where)}
        return " and ".join(sorted(found))
    package = json.loads((cache / style.where.split("/")[0] / "package.json").read_text())
    return str(package["license"])


def verify_licences(cache: Path) -> None:
    """Check each named style's licence against what its package says today.

    Raises:
        ValueError: a package states another licence than this file, or a training licence is not allowed.
    """
    sets = collections(cache)
    for style in STYLES:
        stated = _stated_licence(cache, style, sets)
        if stated != style.licence:
            raise ValueError(f"{style.name}: stated licence {stated!r}, expected {style.licence!r}")
        if style.role == "train" and style.licence not in ALLOWED | {"free for any use"}:
            raise ValueError(f"{style.name}: {style.licence} is not allowed for training")
