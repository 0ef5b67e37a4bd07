"""Transparent pictures: what lies under a transparent pixel never changes what a model sees."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lvrpo.data.jsonl import DataError, JsonlExamples, load_picture

#: 6 x 4 pixels: the left half shows one colour, the right half is transparent.
WIDTH, HEIGHT = 6, 4
Colour = tuple[int, int, int]
SEEN: Colour = (40, 90, 200)
SEEN_GRAY = 100


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits: int, kind: int, row: bytes, extra: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """A PNG of equal rows, written by hand: Pillow cannot save every kind that it reads."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * HEIGHT)
    parts = [(b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def packed(levels: list[int], bits: int) -> bytes:
    size = -(-len(levels) * bits // 8)
    digits = "".join(f"{level:0{bits}b}" for level in levels)
    return int(digits.ljust(8 * size, "0"), 2).to_bytes(size, "big")


def rgba(hidden: Colour, path: Path) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    pixels[:, :3] = (*SEEN, 255)
    pixels[:, 3:] = (*hidden, 0)
    Image.fromarray(pixels).save(path, lossless=True, exact=True)


def gray_alpha(hidden: Colour, path: Path) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 2), np.uint8)
    pixels[:, :3] = (SEEN_GRAY, 255)
    pixels[:, 3:] = (hidden[0], 0)
    Image.fromarray(pixels).save(path)


def palette(transparency: int | bytes) -> Callable[[Colour, Path], None]:
    def write(hidden: Colour, path: Path) -> None:
        picture = Image.new("P", (WIDTH, HEIGHT), 0)
        picture.putpalette([*SEEN, *hidden])
        picture.paste(1, (3, 0, WIDTH, HEIGHT))
        picture.save(path, transparency=transparency)

    return write


def gray_key(bits: int) -> Callable[[Colour, Path], None]:
    """One transparent level of gray; what is seen is another."""

    def write(hidden: Colour, path: Path) -> None:
        level = hidden[0] >> (8 - bits)
        seen = (level + 1) % (1 << bits)
        row = packed([seen] * 3 + [level] * 3, bits)
        path.write_bytes(png(bits, 0, row, [(b"tRNS", struct.pack(">H", level))]))

    return write


def colour_key(hidden: Colour, path: Path) -> None:
    seen = bytes(255 - value for value in hidden)
    key = struct.pack(">HHH", *hidden)
    path.write_bytes(png(8, 2, seen * 3 + bytes(hidden) * 3, [(b"tRNS", key)]))


def deep(*levels: int) -> bytes:
    return struct.pack(f">{len(levels)}H", *(257 * level for level in levels))


def deep_alpha(hidden: Colour, path: Path) -> None:
    seen, under = ((*SEEN, 255), (*hidden, 0))
    path.write_bytes(png(16, 6, deep(*seen) * 3 + deep(*under) * 3))


def deep_gray_alpha(hidden: Colour, path: Path) -> None:
    seen, under = (SEEN_GRAY, 255), (hidden[0], 0)
    path.write_bytes(png(16, 4, deep(*seen) * 3 + deep(*under) * 3))


KINDS: dict[str, tuple[str, Callable[[Colour, Path], None]]] = {
    "RGBA": ("png", rgba),
    "RGBA, WebP": ("webp", rgba),
    "RGBA, TIFF": ("tiff", rgba),
    "RGBA, 16 bits": ("png", deep_alpha),
    "LA": ("png", gray_alpha),
    "LA, 16 bits": ("png", deep_gray_alpha),
    "palette, one index": ("png", palette(1)),
    "palette, an alpha each": ("png", palette(b"\xff\x00")),
    "palette, GIF": ("gif", palette(1)),
    "1, a level": ("png", gray_key(1)),
    "L of 2 bits, a level": ("png", gray_key(2)),
    "L of 4 bits, a level": ("png", gray_key(4)),
    "L, a level": ("png", gray_key(8)),
    "RGB, a colour": ("png", colour_key),
}
COLOURS = st.tuples(*[st.integers(0, 255)] * 3).filter(lambda c: c != SEEN)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hidden_colour_never_shows(kind, channels, tmp_path_factory):
    suffix, write = KINDS[kind]
    path = tmp_path_factory.mktemp("pictures") / f"picture.{suffix}"

    @settings(max_examples=12, deadline=None)
    @given(hidden=COLOURS)
    def check(hidden):
        write(hidden, path)
        picture = load_picture(path, (channels, HEIGHT, WIDTH))
        np.testing.assert_array_equal(picture[:, :, 3:], np.ones((channels, HEIGHT, 3)))
        # A smaller copy has no trace of it either, where resizing mixes neighbours.
        opaque = path.with_name("opaque.png")
        seen = np.rint(picture * 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(seen[:, :, 0] if channels == 1 else seen).save(opaque)
        np.testing.assert_array_equal(
            load_picture(path, (channels, 2, 3)), load_picture(opaque, (channels, 2, 3))
        )

    check()


@settings(max_examples=50, deadline=None)
@given(colour=st.tuples(*[st.integers(0, 255)] * 3), alpha=st.integers(0, 255))
def test_half_transparent_pixels_are_mixed_with_white(colour, alpha, tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "half.png"
    Image.new("RGBA", (2, 2), (*colour, alpha)).save(path)
    mixed = [(c * alpha + 255 * (255 - alpha)) / 255 for c in colour]
    picture = load_picture(path, (3, 2, 2))[:, 0, 0] * 255
    assert np.abs(picture - mixed).max() <= 1.01  # two roundings to whole levels


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "CMYK", "RGBA", "LA"])
def test_opaque_pictures_are_what_pillow_makes_of_them(mode, tmp_path):
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    path = tmp_path / f"picture.{'tiff' if mode == 'CMYK' else 'png'}"
    colours.convert(mode).save(path)
    for channels, wanted in ((1, "L"), (3, "RGB")):
        with Image.open(path) as file:
            expected = np.asarray(file.convert(wanted), np.float32).reshape(5, 7, channels) / 255
        found = load_picture(path, (channels, 5, 7))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.transpose(1, 2, 0), expected)


def test_a_transparent_colour_of_16_bits_is_refused_like_other_deep_pictures(tmp_path):
    row = struct.pack(">3H", 0x8001, 3, 4) * WIDTH
    key = struct.pack(">3H", 0x8001, 3, 4)
    (tmp_path / "deep.png").write_bytes(png(16, 2, row, [(b"tRNS", key)]))
    (tmp_path / "data.jsonl").write_text(
        '{"task": "generate", "prompt": "x", "target": "deep.png"}'
    )
    with pytest.raises(DataError, match=r"data\.jsonl:1: field 'target' .* expected 8 bits"):
        JsonlExamples(tmp_path / "data.jsonl", (3, 4, 4))


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_file_of_several_frames_is_no_picture(tmp_path, kind, frames):
    drawn = [Image.new("RGB", (8, 8), (80 * at, 0, 0)) for at in range(frames)]
    drawn[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=drawn[1:])
    if frames == 1:
        assert load_picture(tmp_path / f"a.{kind}", (3, 8, 8)).max() == 0
        return
    with pytest.raises(ValueError, match=f"{frames} frames, expected one: save those"):
        load_picture(tmp_path / f"a.{kind}", (3, 8, 8))


def test_the_photo_of_a_camera_that_keeps_others_beside_it(tmp_path):
    photo, depth = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8))
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[depth])
    assert load_picture(tmp_path / "a.jpg", (3, 8, 8)).min() > 0.9
