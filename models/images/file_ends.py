"""Does a file end where its format says? A few of its bytes tell, and so do the pixels that a PNG lacks."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from typing import IO

from PIL import Image

from models.errors import DataError
from models.images.raster import is_tiff

# What may follow the end of an image: previews, notes of cameras, rubbish of transfers.
TAIL = 65_536
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
JPEG_END, JPEG_SCAN = b"\xff\xd9", b"\xff\xda"
# Bytes of TIFF's types of values, and how struct calls the whole numbers.
TIFF_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TIFF_NUMBERS = {3: "H", 4: "I", 16: "Q"}
NOWHERE = 1 << 63
# (x0, y0, dx, dy) of the seven passes of an interlaced PNG.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def seems_cut(stream: IO[bytes]) -> bool:
    """Whether a file of pixels seems to end early: a suspicion for a few reads, which decoding it confirms or not.

    JPEG: no end of image after the last scan; PNG: no end chunk; WebP, BMP: fewer bytes than the header says;
    TIFF: strips or tiles of the first image beyond the end. Other formats never seem cut.

    Args:
        stream: that can be sought; its position is lost.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    start = stream.read(64)
    if start.startswith(b"\xff\xd8"):
        tail = _tail(stream, size)
        return tail.rfind(JPEG_END) <= tail.rfind(JPEG_SCAN)
    if start.startswith(PNG_START):
        return PNG_END not in _tail(stream, size)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return size < 8 + int.from_bytes(start[4:8], "little")
    if start[:2] == b"BM":
        return size < _bmp_bytes(start)
    return is_tiff(start) and _tiff_bytes(stream, start) > size


def _tail(stream: IO[bytes], size: int) -> bytes:
    stream.seek(max(0, size - TAIL))
    return stream.read(TAIL)


def _bmp_bytes(start: bytes) -> int:
    """Bytes of an uncompressed BMP; 0 where its header does not tell."""
    if len(start) < 34 or int.from_bytes(start[30:34], "little") not in (0, 3):
        return 0
    offset, head, width, height = struct.unpack_from("<Iiii", start, 10)
    bits = int.from_bytes(start[28:30], "little")
    return offset + (width * bits + 31) // 32 * 4 * abs(height) if head >= 40 else 0


def _tiff_bytes(stream: IO[bytes], start: bytes) -> int:
    """Where the last of the first image's directory, tags, strips and tiles ends; NOWHERE where it is not known."""
    order, big = "<" if start[:2] == b"II" else ">", b"+" in start[2:4]
    number, count, value = ("Q", "Q", 8) if big else ("H", "I", 4)
    entry = struct.Struct(f"{order}HH{count}{value}s")
    ends: list[int] = []
    fields: dict[int, tuple[int, ...]] = {}
    try:
        (at,) = struct.unpack_from(order + count, start, 8 if big else 4)
        stream.seek(at)
        (entries,) = struct.unpack(order + number, stream.read(struct.calcsize(order + number)))
        directory = stream.read(entries * entry.size)
        for tag, kind, items, inline in entry.iter_unpack(directory):
            length = items * TIFF_TYPES.get(kind, 1)
            place = struct.unpack(order + count, inline)[0] if length > value else 0
            ends.append(place + length if length > value else 0)
            if tag in (273, 279, 324, 325):
                if place:
                    stream.seek(place)
                content = stream.read(length) if place else inline[:length]
                fields[tag] = struct.unpack(f"{order}{items}{TIFF_NUMBERS[kind]}", content)
        if len(directory) < entries * entry.size:
            return NOWHERE
        offsets, counts = ((fields[a] if a in fields else fields[b]) for a, b in ((273, 324), (279, 325)))
    except (struct.error, KeyError, OverflowError, MemoryError, OSError):
        # Whatever is wrong with the header, or the counts are missing: whoever decodes the file says it.
        return NOWHERE
    # A strip that nobody wrote has no bytes, at 0.
    return max([*ends, *(a + n for a, n in zip(offsets, counts, strict=False))], default=0)


def check_filled(image: Image.Image, content: bytes | str | os.PathLike | IO[bytes], name: str) -> None:
    """Check that a decoded PNG has all its pixels: Pillow fills missing ones with zeros, and reports nothing.

    Args:
        image: as Pillow opened it, content: its bytes, path or stream; name: what the message calls it.

    Raises:
        DataError: the pixel data end early.
        OSError: they cannot be decoded.
    """
    if image.format != "PNG":
        return
    image.load()
    width, height = image.size
    # Rows are filled up from the first one that is missing; interlaced ones anywhere.
    if not image.info.get("interlace") and image.crop((0, height - 1, width, height)).getbbox(alpha_only=False):
        return
    if isinstance(content, (str, os.PathLike)):
        with open(content, "rb") as stream:
            needed, held = _png_bytes(stream)
    else:
        needed, held = _png_bytes(io.BytesIO(content) if isinstance(content, bytes) else content)
    if held < needed:
        raise DataError(f"{name}: its pixel data end early ({held:,} of {needed:,} bytes); get the file anew", "damaged")


def _png_bytes(stream: IO[bytes]) -> tuple[int, int]:
    """Bytes of all rows as a PNG's header tells, and how many of them its data inflate to."""
    needed, held, inflate = 0, 0, zlib.decompressobj()
    for kind, content in _chunks(stream):
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">IIBB", content)
            needed = _row_bytes(width, height, depth * _PNG_CHANNELS[colour], interlaced=content[12] == 1)
        data = content if kind == b"IDAT" else b""
        try:
            while data and held < needed and not inflate.eof:
                held += len(inflate.decompress(data, 1 << 20))
                data = inflate.unconsumed_tail
        except zlib.error:
            # Such as a wrong checksum after the last row: Pillow has read what there is without complaint.
            return needed, needed
    return needed, held


def _chunks(stream: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    stream.seek(len(PNG_START))
    while len(head := stream.read(8)) == 8 and head[4:] != b"IEND":
        yield head[4:], stream.read(int.from_bytes(head[:4], "big"))
        stream.seek(4, io.SEEK_CUR)


def _row_bytes(width: int, height: int, bits: int, interlaced: bool) -> int:
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-max(width - x, 0) // dx), -(-max(height - y, 0) // dy)) for x, y, dx, dy in passes]
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns)
