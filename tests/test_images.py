"""Image files: of all kinds, of many bits, transparent, turned, odd, broken, or none at all."""

import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import Tensor
from torch.utils.data import DataLoader

from cnn import data
from cnn.data import UNCOUNTED, ImageFiles, UnreadableImages
from cnn.errors import UsageError

EXAMPLES = int(os.environ.get("TRITON_CNN_EXAMPLES", "0"))
"""Draws other mutations, so many times as many."""

MUTATIONS = 200 * max(1, EXAMPLES)


def read(path: Path, size: int, channels: int = 3) -> Tensor:
    return ImageFiles([path], [0], size, channels).read(0)


def bytes_of(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def four_corners() -> Image.Image:
    """Red, green, blue and white quarters of 40x40 pixels."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20, :20, 0] = pixels[:20, 20:, 1] = pixels[20:, :20, 2] = 255
    pixels[20:, 20:] = 255
    return Image.fromarray(pixels)


def test_images_of_all_kinds(tmp_path):
    """The middle square; grey, palette and opaque as colours."""
    halves = Image.new("L", (8, 4), 0)
    halves.paste(255, (4, 0, 8, 4))
    halves.save(tmp_path / "grey.png")
    halves.convert("1").save(tmp_path / "two.png")
    halves.convert("P").save(tmp_path / "palette.gif")
    halves.convert("CMYK").save(tmp_path / "inks.tif")
    halves.convert("LA").save(tmp_path / "alpha.webp", lossless=True)
    halves.save(tmp_path / "first.tif", save_all=True, append_images=[Image.new("L", (8, 4), 99)])
    for path in tmp_path.iterdir():
        image = read(path, 4)
        assert image.dtype == torch.uint8
        assert image[:, 1].tolist() == [[0, 0, 255, 255]] * 3, path
        assert read(path, 4, channels=1)[0, 1].tolist() == [0, 0, 255, 255], path


TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""By each orientation Pillow's transposition that undoes what a viewer does for it."""


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "jpeg"])
@pytest.mark.parametrize("orientation", TURNS)
def test_orientations(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = four_corners().transpose(Image.Transpose(TURNS[orientation]))
    options = {"webp": {"lossless": True}, "jpeg": {"quality": 100, "subsampling": 0}}
    turned.save(tmp_path / f"x.{kind}", exif=exif, **options.get(kind, {}))
    four_corners().save(tmp_path / "upright.png")
    difference = read(tmp_path / f"x.{kind}", 40).int() - read(tmp_path / "upright.png", 40).int()
    assert difference.abs().max() <= (3 if kind == "jpeg" else 0)


def with_exif(*entries: bytes, blob: bytes = b"", order: bytes = b"II") -> bytes:
    """The EXIF of an image turned right, with further ``entries`` of 12 bytes."""
    rows = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), *entries]
    table = struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4) + blob
    return b"Exif\0\0" + order + b"*\0\x08\0\0\0" + table


AFTER = 8 + 2 + 12 * 2 + 4
"""Where the blob of an EXIF of two entries lies."""

ODD_EXIF = {
    "resolution in words": with_exif(struct.pack("<HHII", 0x011A, 2, 8, AFTER), blob=b"72 dpi\0\0"),
    "no resolution": with_exif(struct.pack("<HHII", 0x011A, 5, 1, AFTER), blob=bytes(8)),
    "beyond its end": with_exif(struct.pack("<HHII", 0x010F, 2, 99999, 0xFFFF)),
    "unknown type": with_exif(struct.pack("<HHII", 0x9000, 77, 1, 0)),
    "points to itself": with_exif(struct.pack("<HHII", 0x8769, 4, 1, 8)),
    "bytes for a number": with_exif(struct.pack("<HHII", 0x0103, 2, 4, 0xFFFFFFFF)),
}
NO_EXIF = {
    "empty": b"Exif\0\0",
    "no TIFF": b"Exif\0\0XX*\0\x08\0\0\0",
    "cut": with_exif()[:20],
    "an orientation of 99": with_exif().replace(
        struct.pack("<HH", 6, 0), struct.pack("<HH", 99, 0)
    ),
    "an orientation in words": b"Exif\0\0II*\0\x08\0\0\0\x01\0"
    + struct.pack("<HHI4s", 274, 2, 3, b"up"),
}


@pytest.mark.parametrize("odd", [*ODD_EXIF, *NO_EXIF])
def test_odd_exif_does_not_matter(odd, tmp_path):
    """A sound picture is read; it is turned if its orientation can be read."""
    wide = Image.new("RGB", (30, 20))
    wide.paste((255, 0, 0), (0, 0, 15, 20))
    plain = bytes_of(wide, "JPEG", quality=95)
    exif = (ODD_EXIF | NO_EXIF)[odd]
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "x.jpg").write_bytes(plain[:2] + segment + plain[2:])
    red = read(tmp_path / "x.jpg", 16)[0].float()
    above, left = (red[:8].mean() > 200, red[:, :8].mean() > 200)
    assert (above, left) == (odd in ODD_EXIF, odd in NO_EXIF)


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)

DEEP = {
    "16 bits": ("png", (RAMP * 65535).astype(np.uint16)),
    "16 bits of TIFF": ("tif", (RAMP * 65535).astype(np.uint16)),
    "16 bits, big end first": ("tif", (RAMP * 65535).astype(">u2")),
    "16 bits of PGM": ("pgm", (RAMP * 65535).astype(np.uint16)),
    "32 bits as 8": ("tif", (RAMP * 255).astype(np.int32)),
    "32 bits as 16": ("tif", (RAMP * 65535).astype(np.int32)),
    "32 bits": ("tif", (RAMP * 2e9).astype(np.int32)),
    "32 bits of either sign": ("tif", (RAMP * 2e9 - 1e9).astype(np.int32)),
    "floats to 1": ("tif", RAMP.astype(np.float32)),
    "floats to 255": ("tif", (RAMP * 255).astype(np.float32)),
    "floats to 65535": ("tif", (RAMP * 65535).astype(np.float32)),
    "floats of any size": ("tif", (RAMP * 1e30 - 3e29).astype(np.float32)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_keep_their_shades(kind, tmp_path):
    suffix, pixels = DEEP[kind]
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(pixels).save(path)
    for channels in (1, 3):
        image = read(path, 64, channels)
        assert np.abs(image.numpy() - 255 * RAMP).max() <= 1
        assert len(image.unique()) == 256


def test_dark_and_odd_deep_images(tmp_path):
    """The white of 16 bits does not depend on an image; NaN is black and infinity white."""
    path = tmp_path / "x.tif"
    for suffix in ("png", "tif", "pgm"):
        dark = path.with_suffix(f".{suffix}")
        Image.fromarray(np.full((8, 8), 257 * 9, np.uint16)).save(dark)
        assert read(dark, 8).unique().tolist() == [9]
    values = np.array([[0, np.nan], [0.5, 1]], np.float32)
    Image.fromarray(values).save(path)
    assert read(path, 2)[0].tolist() == [[0, 0], [128, 255]]
    values = np.array([[-2, np.inf], [0, 2]], np.float32)
    Image.fromarray(values).save(path)
    assert read(path, 2)[0].tolist() == [[0, 255], [128, 255]]
    path.with_suffix(".pgm").write_bytes(b"P5 2 1 1023\n" + struct.pack(">HH", 1023, 512))
    assert read(path.with_suffix(".pgm"), 1)[0].item() in (191, 192)
    for nothing in (np.nan, np.inf):
        Image.fromarray(np.full((2, 2), nothing, np.float32)).save(path)
        assert len(read(path, 2).unique()) == 1
    picture = Image.fromarray((RAMP * 65535).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path.with_suffix(".png"), exif=exif)
    turned = np.rot90(RAMP * 255, -1)
    assert np.abs(read(path.with_suffix(".png"), 64).numpy() - turned).max() <= 1


def test_a_tiff_of_12_bits(tmp_path):
    """Two pixels are three bytes; no tool at hand writes them."""
    first, second = (RAMP * 4095).round().astype(int).reshape(-1, 2).T
    pixels = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    strip = pixels.astype(np.uint8).tobytes()
    values = {256: 64, 257: 64, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 64, 279: len(strip)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    start = b"II*\0" + struct.pack("<I", 8 + len(strip))
    rest = strip + struct.pack("<H", len(values)) + table + bytes(4)
    (tmp_path / "x.tif").write_bytes(start + rest)
    assert np.abs(read(tmp_path / "x.tif", 64).numpy() - 255 * RAMP).max() <= 1


@pytest.mark.parametrize("kind", ["png", "webp", "tif"])
def test_what_is_transparent_has_no_colour(kind, tmp_path):
    """It is white, whatever is stored there; half of it is half white."""
    images = []
    for hidden in ((0, 0, 0), (10, 240, 200)):
        pixels = np.zeros((16, 16, 4), np.uint8)
        pixels[..., :3] = hidden
        pixels[4:8, 4:12] = 200, 60, 30, 255
        pixels[8:12, 4:12] = 0, 0, 0, 102
        path = tmp_path / f"{len(images)}.{kind}"
        Image.fromarray(pixels).save(path, **({"lossless": True} if kind == "webp" else {}))
        images.append(read(path, 16))
    assert torch.equal(*images)
    assert images[0][:, 0, 0].tolist() == [255] * 3
    assert images[0][:, 5, 5].tolist() == [200, 60, 30]
    assert images[0][:, 9, 9].tolist() == [153] * 3


def test_transparency_of_grey_and_palette(tmp_path):
    grey = Image.new("LA", (4, 4), (7, 0))
    grey.save(tmp_path / "grey.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "key.png", transparency=7)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "palette.gif", transparency=1)
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0]))
    for path in tmp_path.iterdir():
        for channels in (1, 3):
            assert read(path, 4, channels).unique().tolist() == [255], path


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 2)])
def test_narrow_images(size, tmp_path):
    Image.new("RGB", size, (9, 9, 9)).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png", 224).unique().tolist() == [9]


class Unusual(Exception):
    """An error of a class that only a decoder knows."""


@pytest.mark.parametrize(
    "error",
    [
        *(
            RuntimeError("no primary item"),
            IndexError("index"),
            struct.error("unpack"),
            KeyError(1),
        ),
        *(AssertionError(), MemoryError(), RecursionError(), Unusual("x"), ZeroDivisionError()),
    ],
    ids=repr,
)
def test_an_error_of_any_class_is_a_broken_image(error, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(UsageError, match=f"cannot read .*x.png: {error or type(error).__name__}"):
        read(tmp_path / "x.png", 4)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_under_another_name(tmp_path):
    whole = bytes_of(Image.new("RGB", (24, 30)), "AVIF")
    (tmp_path / "x.png").write_bytes(whole.replace(b"pitm", b"free"))  # no primary item
    with pytest.raises(UsageError, match="cannot read"):
        read(tmp_path / "x.png", 4)


def mutated(contents: bytes, draw: np.random.Generator) -> bytes:
    """Some bits flipped, the end cut off, a block zeroed, or bytes put in."""
    damaged = bytearray(contents)
    at = int(draw.integers(len(damaged)))
    match draw.integers(4):
        case 0:
            for place in draw.integers(len(damaged), size=draw.integers(1, 9)).tolist():
                damaged[place] ^= 1 << int(draw.integers(8))
        case 1:
            del damaged[at:]
        case 2:
            damaged[at : at + 64] = bytes(len(damaged[at : at + 64]))
        case _:
            damaged[at:at] = draw.bytes(16)
    return bytes(damaged)


def test_mutated_images_are_read_or_broken(tmp_path):
    draw = np.random.default_rng(EXAMPLES)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.0
    noise = Image.fromarray(draw.integers(256, size=(24, 20, 3), dtype=np.uint8))
    deep = Image.fromarray(draw.integers(65536, size=(24, 20), dtype=np.uint16))
    sound = [bytes_of(noise, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    sound += [bytes_of(noise, kind) for kind in ("GIF", "BMP", "PPM")]
    sound += [bytes_of(noise.convert("RGBA"), "PNG"), bytes_of(deep, "PNG")]
    sound += [bytes_of(deep, "TIFF", compression="tiff_lzw")]
    path, count = tmp_path / "x.png", {"read": 0, "broken": 0}
    images = ImageFiles([path], [3], 16)
    for number in range(MUTATIONS):
        path.write_bytes(mutated(sound[number % len(sound)], draw))
        image, label = images[0]
        assert (image.shape, image.dtype) == ((3, 16, 16), torch.uint8)
        assert label in (3, -1)
        count["read" if label == 3 else "broken"] += 1
    assert min(count.values()) >= MUTATIONS // 10


def test_commands_skip_mutated_images(cpu, tmp_path):
    """None ends a run or is lost: those that can be read count, the others are told of."""
    draw = np.random.default_rng(EXAMPLES)
    picture = Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8))
    sound = [bytes_of(picture, kind) for kind in ("PNG", "JPEG", "TIFF", "GIF")]
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(50):
            contents = sound[number % 4]
            contents = mutated(contents, draw) if number % 2 else contents
            (tmp_path / "set" / name / f"{number}.png").write_bytes(contents)
    argv = ["train", "--model", "lenet5", "--size", 32, "--epochs", 1, "--batch-size", 8]
    argv += ["--data", f"folder:{tmp_path}/set", "--output", tmp_path / "run", "--workers", 1]
    code, _, err = cpu.run(*argv, "--broken", "skip")
    assert (code, "Traceback" in err) == (0, False), err
    assert "unreadable images skipped" in err
    code, out, err = cpu.run("predict", tmp_path / "run" / "last.pt", tmp_path / "set")
    assert (code, "Traceback" in err) == (1, False), err
    assert len(out.splitlines()) + len(err.splitlines()) == 100
    assert len(out.splitlines()) >= 50


def test_broken_images(tmp_path):
    """Cut off, no image, or away: they are told of once and do not count, or stop the program."""
    for name in ("0", "1", "2", "3"):
        Image.new("RGB", (20, 30)).save(tmp_path / f"{name}.png")
    noise = np.random.default_rng(0).integers(256, size=(50, 50, 3), dtype=np.uint8)
    whole = bytes_of(Image.fromarray(noise), "PNG")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "bomb.png").write_bytes(bytes_of(Image.new("1", (20000, 20000)), "PNG"))
    paths = data.image_files(tmp_path)
    images = ImageFiles(paths, [3] * len(paths), 8)
    paths[0].unlink()
    told = []
    watch = UnreadableImages(images, "skip", told.append)
    for _ in range(2):
        labels = torch.cat([watch(labels) for _, labels in DataLoader(images, 4, num_workers=2)])
        broken = [paths[at] for at in labels.ne(3).nonzero().flatten().tolist()]
        names = ["bomb.png", "cut.png", "text.jpg"]
        assert broken == [paths[0], *(tmp_path / name for name in names)]
        assert labels[labels != 3].tolist() == [UNCOUNTED] * 4
    reasons = ["No such file or directory", None, None, "cannot identify image file"]
    for line, path, reason in zip(told, broken, reasons, strict=True):
        assert re.fullmatch(f"cannot read {path}: {reason or '.+'}; skipped", line)
    strict = UnreadableImages(images, "stop", told.append)
    with pytest.raises(UsageError) as caught:
        strict(torch.tensor([3, images[len(paths) - 1][1]]))
    why = "cannot identify image file; --broken skip continues without it"
    assert str(caught.value) == f"cannot read {tmp_path}/text.jpg: {why}"
    assert strict(torch.tensor([3, 0])).tolist() == [3, 0]


def test_no_program_in_an_image_is_run(tmp_path, monkeypatch):
    def started(*args, **options):
        pytest.fail(f"{args} was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    with pytest.raises(UsageError, match="it is PostScript, a program"):
        read(tmp_path / "x.png", 8)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(UsageError, match="it is not a file"):
            read(path, 8)
    assert data.image_files(tmp_path) == []


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match="needs Pillow: pip install 'triton-cnn\\[train\\]'"):
        ImageFiles([tmp_path / "x.png"], [0], 8)
