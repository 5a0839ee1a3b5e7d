"""Pictures that packages carry: photographs of scikit-image and scikit-learn, and drawings, which are emoji.

PyPI scikit-image 0.25.2 (its functions tell each picture's origin; those used here are public domain, CC0 or without
known restrictions), one of scikit-learn's photographs (CC BY 2.0, by vultilion) and Debian's fonts-noto-color-emoji
(SIL OFL 1.1, by Google). Every file is checked by its SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from benchmarks.data_sets.images import DataError, unpack_debian
from benchmarks.harness.record import CACHE, MissingContender, fetched

PACKAGE, FONT_PACKAGE = "scikit-image==0.25.2", "fonts-noto-color-emoji"
FONT = Path("usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CELL = 136
"""The emoji's width and the side of a cell of a sheet; they are bitmaps of one size."""
SHA256 = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    "flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    "NotoColorEmoji.ttf": "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec",
}

Picture = npt.NDArray[np.uint8]
"""[H, W, 3]."""


def photos(names: Sequence[str]) -> list[Picture]:
    """Photographs by their files' names.

    Raises:
        DataError: a package cannot be had, or holds another picture.
    """
    try:
        ours = fetched(PACKAGE.replace("==", "-"), PACKAGE) / "skimage" / "data"
    except MissingContender as error:
        raise DataError(f"{error}; it needs a package index") from error
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError("a photograph is scikit-learn's: pip install scikit-learn")
    theirs = Path(found.origin).parent / "datasets" / "images"
    pictures = []
    for name in names:
        path = ours / name if (ours / name).exists() else theirs / name
        _check(path)
        with Image.open(path) as image:
            pictures.append(np.array(image.convert("RGB")))
    return pictures


def drawings(sheets: Sequence[str]) -> list[Picture]:
    """Sheets of four emoji each, on a plain ground whose colour differs from sheet to sheet.

    Args:
        sheets: of each, its four characters.

    Raises:
        DataError: the font cannot be had, or is another.
    """
    folder = CACHE / FONT_PACKAGE
    if not folder.is_dir():
        unpack_debian(FONT_PACKAGE, CACHE, folder)
    _check(folder / FONT)
    font = ImageFont.truetype(str(folder / FONT), 109)
    pictures = []
    for number, sheet in enumerate(sheets):
        ground = tuple(150 + 100 * (number * step % 7) // 6 for step in (1, 2, 3))
        image = Image.new("RGB", (2 * CELL, 2 * CELL), ground)
        draw = ImageDraw.Draw(image)
        for at, character in enumerate(sheet):
            draw.text((at % 2 * CELL, at // 2 * CELL), character, font=font, embedded_color=True)
        pictures.append(np.array(image))
    return pictures


def _check(path: Path) -> None:
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if digest != SHA256.get(path.name):
        raise DataError(f"{path}: SHA-256 {digest}, expected {SHA256.get(path.name)}")
