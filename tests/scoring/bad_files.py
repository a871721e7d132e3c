"""A generator of files that look like images to a folder listing and are none that can be read."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
SUFFIX = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "BMP": ".bmp", "WEBP": ".webp"}


def _image(form: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def _cut(form: str, share: float) -> bytes:
    content = _image(form)
    return content[: int(len(content) * share)]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = _chunk(b"IHDR", head) + (_chunk(b"IDAT", data) if data else b"") + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def kinds() -> list[tuple[str, Callable[[], bytes]]]:
    """(file name, content) of a hundred and more kinds of bad files."""
    made: list[tuple[str, Callable[[], bytes]]] = []
    for form in FORMATS:
        suffix = SUFFIX[form]
        made += [(f"empty {form}{suffix}", lambda: b""), (f"one byte {form}{suffix}", lambda: b"\x00")]
        made += [(f"zeros {form}{suffix}", lambda: bytes(5000)), (f"text {form}{suffix}", lambda: b"not an image\n" * 50)]
        made += [(f"html {form}{suffix}", lambda: b"<html><body>404 Not Found</body></html>")]
        made += [
            (f"json {form}{suffix}", lambda: b'{"error": "denied"}'),
            (f"zip {form}{suffix}", lambda: b"PK\3\4" + bytes(99)),
        ]
        made += [(f"random {form}{suffix}", lambda: np.random.default_rng(1).bytes(4000))]
        made += [(f"header alone {form}{suffix}", lambda f=form: _image(f)[:12])]
        for share in (0.02, 0.1, 0.3, 0.5, 0.7):
            made.append((f"cut at {share} {form}{suffix}", lambda f=form, s=share: _cut(f, s)))
        made += [
            (f"shifted {form}{suffix}", lambda f=form: b"\n" + _image(f)),
            (f"pdf {form}{suffix}", lambda: b"%PDF-1.4\n%%EOF"),
        ]
        made += [(f"reversed {form}{suffix}", lambda f=form: _image(f)[::-1])]
        made += [
            (f"two newlines for one {form}{suffix}", lambda f=form: _image(f)[:200].replace(b"\n", b"\r\n") + bytes(9))
        ]
    huge = 60_000
    made += [
        ("bomb by header.png", lambda: _png(huge, huge, zlib.compress(bytes(1000)))),
        ("no pixels.png", lambda: _png(0, 10)),
        ("no data.png", lambda: _png(10, 10)),
        ("bad depth.png", lambda: _png(10, 10, zlib.compress(bytes(310)), depth=7)),
        ("bad colour.png", lambda: _png(10, 10, zlib.compress(bytes(310)), colour=9)),
        ("bad deflate.png", lambda: _png(10, 10, b"\x78\x9c" + bytes(40))),
        ("svg.png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("tiff without directory.tif", lambda: b"II*\x00\xff\xff\xff\xff"),
        ("tiff with a loop.tif", lambda: b"II*\x00\x08\x00\x00\x00" + bytes(2) + b"\x08\x00\x00\x00"),
        ("jpeg of markers.jpg", lambda: b"\xff\xd8" + b"\xff\xe0\x00\x10" * 30 + b"\xff\xd9"),
        ("riff of nothing.webp", lambda: b"RIFF\x04\x00\x00\x00WEBP"),
        ("video.jpg", lambda: b"\x00\x00\x00\x18ftypmp42" + bytes(400)),
        ("git lfs pointer.png", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"),
    ]
    return made


def write_bad_files(folder: Path, most: int | None = None) -> list[str]:
    """Write them (every so many, to make ``most``) into a folder; return their names."""
    chosen = kinds()
    if most is not None:
        chosen = chosen[:: len(chosen) // most][:most]
    for name, content in chosen:
        (folder / name).write_bytes(content())
    return [name for name, _ in chosen]


def write_real_and_broken(folder: Path, sources: Sequence[Path], count: int) -> None:
    """Real images under their names and, up to ``count`` files, damaged copies of them."""
    rng = np.random.default_rng(0)
    for source in sources:
        shutil.copy(source, folder / source.name)
    for i in range(count - len(sources)):
        source = sources[i % len(sources)]
        content = bytearray(source.read_bytes())
        way = ("cut", "holes", "head", "empty", "shifted")[min(int(rng.integers(0, 9)), 4)] if i % 2 else "cut"
        if way == "cut":
            content = content[: int(len(content) * rng.uniform(0.001, 0.95))]
        elif way == "holes":
            for at in rng.integers(len(content) // 10, len(content), 20):
                content[at : at + 50] = bytes(50)
        elif way == "head":
            content[:8] = bytes(8)
        else:
            content = bytearray() if way == "empty" else b"\n" + content
        (folder / f"{way} {i:03} {source.name}").write_bytes(content)


def write_unreachable(folder: Path) -> list[str]:
    """Files that are listed and cannot be opened, whatever they hold: dangling and looping links."""
    os.symlink(folder / "nowhere.png", folder / "dangling.png")
    os.symlink(folder / "loop.png", folder / "loop.png")
    return ["dangling.png", "loop.png"]
