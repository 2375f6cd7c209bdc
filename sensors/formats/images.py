"""JPEG and PNG: the size that a header declares, and decoding with one rule for all cameras (RGB, orientation tags ignored)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.records import Image, RecordError

MAX_PIXELS = 50_000_000
MAX_BYTES = 64 << 20
# start-of-frame markers of JPEG: all of C0..CF but the tables C4, C8, CC (ITU T.81, table B.1)
_FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def image_size(encoded: bytes, what: str) -> tuple[int, int]:
    """(width, height) from the header of JPEG or PNG bytes, by content and not by name, before anything is decoded.

    RecordError for other content, a header without size, and more than MAX_PIXELS."""
    if encoded[:8] == b"\x89PNG\r\n\x1a\n" and encoded[12:16] == b"IHDR" and len(encoded) >= 24:
        width, height = int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
    elif encoded[:3] == b"\xff\xd8\xff":
        width, height = _jpeg_size(encoded, what)
    else:
        raise RecordError(f"{what}: {len(encoded)} bytes that are neither JPEG nor PNG; dropped")
    if not (width and height) or width * height > MAX_PIXELS:
        raise RecordError(f"{what}: declares {width}x{height} pixels, allowed are 1..{MAX_PIXELS}; dropped")
    return width, height


def _jpeg_size(encoded: bytes, what: str) -> tuple[int, int]:
    at = 2
    while at + 9 <= len(encoded):
        if encoded[at] != 0xFF:
            break
        marker = encoded[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _FRAME_MARKERS:
            return int.from_bytes(encoded[at + 7 : at + 9], "big"), int.from_bytes(encoded[at + 5 : at + 7], "big")
        at += 2 + max(2, int.from_bytes(encoded[at + 2 : at + 4], "big"))
    raise RecordError(f"{what}: a JPEG without frame header (cut off after {len(encoded)} bytes?); dropped")


def sized(image: Image) -> Image:
    """The image, whose record has the size that its header declares; else RecordError."""
    what = f"image of {image.camera} at {image.stamp_ns}"
    if (size := image_size(image.encoded, what)) != (image.width, image.height):
        raise RecordError(f"{what}: the file says {size[0]}x{size[1]} pixels, the record {image.width}x{image.height}")
    return image


def decode(image: Image) -> NDArray[Any]:
    """(height, width, 3) u8 RGB. RecordError for what does not decode completely: a truncated file is never filled up with grey."""
    from PIL import Image as Pillow

    what = f"image of {sized(image).camera} at {image.stamp_ns}"
    try:
        with Pillow.open(io.BytesIO(image.encoded), formats=("JPEG", "PNG")) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise RecordError(f"{what}: does not decode ({error}); dropped") from error
