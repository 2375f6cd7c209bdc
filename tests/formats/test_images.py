"""Images by content: sizes from headers, decoding that never fills up, and what is refused before anything is decoded."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from sensors.formats.images import MAX_PIXELS, decode, image_size
from sensors.records import Image, RecordError

PICTURE = (np.add.outer(np.arange(60), 3 * np.arange(90)) % 256).astype(np.uint8)
COLOUR = np.stack((PICTURE, PICTURE[::-1], 255 - PICTURE), -1)


def encoded(array=COLOUR, kind="JPEG", mode=None, **options):
    stream = io.BytesIO()
    picture = Pillow.fromarray(array)
    (picture.convert(mode) if mode else picture).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks, depth=8, colour=0):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])


def refused(call, *arguments):
    with pytest.raises(RecordError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def image(data, width=90, height=60):
    return Image("front", 1, data, width, height)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("array", [PICTURE, COLOUR], ids=["grey", "colour"])
def test_size_and_pixels_of_a_sound_image(kind, array):
    data = encoded(array, kind, **({"quality": 95} if kind == "JPEG" else {}))
    assert image_size(data, "it") == (90, 60)
    pixels = decode(image(data))
    assert pixels.shape == (60, 90, 3) and pixels.dtype == np.uint8
    truth = array if array.ndim == 3 else np.repeat(array[..., None], 3, 2)
    assert np.abs(pixels.astype(int) - truth).mean() < (8 if kind == "JPEG" else 1e-9)


def test_progressive_jpeg_and_fill_bytes_have_a_size():
    data = encoded(progressive=True)
    assert image_size(data, "it") == (90, 60) == image_size(data[:2] + b"\xff\xff\xff" + data[3:], "it")


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (20_000, 20_000), (10_000, 12_000), (0, 5), (5, 0)])
def test_sizes_beyond_the_limit_are_refused_before_decoding(size):
    said = refused(image_size, png(*size), "it")
    assert f"{size[0]}x{size[1]}" in said and str(MAX_PIXELS) in said


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n", b"<html></html>", b"8BPS\0\1", b"SIMPLE  =", b"GIF89a",
        b"\xff\xd8\xff\xfe\xff\xff" + bytes(9),
    ],
    ids=["empty", "soi", "soi-eoi", "signature", "html", "psd", "fits", "gif", "comment-past-end"],
)  # fmt: skip
def test_what_is_no_jpeg_or_png_has_no_size(data):
    refused(image_size, data, "it")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_image_is_never_filled_up(kind):
    data = encoded(np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8), kind)
    whole = decode(image(data))
    assert "decode" in refused(lambda: decode(image(data[: len(data) // 2])))
    decoded = 0
    for length in range(len(data) - 40, len(data)):  # the end marks may be absent; no pixel may
        try:
            assert np.array_equal(decode(image(data[:length])), whole)
            decoded += 1
        except RecordError:
            continue
    assert decoded < 40


def test_decompression_bombs_end_quickly():
    bomb = zlib.compress(bytes(100 << 20), 9)
    refused(lambda: decode(image(png(1, 1, chunk(b"zTXt", b"c\0\0" + bomb), chunk(b"IDAT", zlib.compress(b"\0\7"))), 1, 1)))
    try:  # one pixel is all that such a file can give
        assert decode(image(png(1, 1, chunk(b"IDAT", bomb)), 1, 1)).shape == (1, 1, 3)
    except RecordError as error:
        assert "\n" not in str(error)


def test_a_wrong_checksum_is_refused():
    data = bytearray(png(1, 1, chunk(b"IDAT", zlib.compress(b"\0\7"))))
    assert decode(image(bytes(data), 1, 1)).tolist() == [[[7, 7, 7]]]
    data[30] ^= 1  # the checksum of IHDR
    refused(lambda: decode(image(bytes(data), 1, 1)))


def test_orientation_tags_turn_nothing():
    exif = Pillow.Exif()
    exif[274] = 6
    data = encoded(exif=exif.tobytes(), quality=95)
    assert np.abs(decode(image(data)).astype(int) - COLOUR).mean() < 8


def test_cmyk_becomes_rgb():
    assert decode(image(encoded(np.zeros((60, 90, 3), np.uint8) + 200, mode="CMYK"))).mean() == pytest.approx(200, abs=3)


def test_the_content_counts_and_the_record_must_agree_with_it():
    assert "neither JPEG nor PNG" in refused(image, b"<html>")
    said = refused(lambda: decode(image(encoded(), 60, 90)))
    assert "the file says 90x60 pixels, the record 60x90" in said


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG"]), st.floats(0, 1), st.binary(min_size=1, max_size=4))
def test_damaged_bytes_give_pixels_of_the_declared_size_or_one_line(kind, place, damage):
    whole = encoded(kind=kind)
    at = int(place * (len(whole) - 1))
    data = whole[:at] + damage + whole[at + len(damage) :]
    try:
        width, height = image_size(data, "it")
        if width * height < 10**6:
            assert decode(image(data, width, height)).shape == (height, width, 3)
    except RecordError as error:
        assert "\n" not in str(error)


def test_decoding_in_threads_leaves_the_filter_of_warnings_alone():
    data, before = encoded(), list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: decode(image(data)), range(200)))
    assert warnings.filters == before
