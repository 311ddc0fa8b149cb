"""Files that claim to be pictures and are not, or are far too large."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def giant(side: int) -> bytes:
    """A PNG of a few bytes that claims ``side`` x ``side`` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def _half() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 60).convert("RGB").save(stream, "PNG")
    return stream.getvalue()[: stream.tell() // 2]


PICTURES = {
    "text": b"these are no pixels\n",
    "nothing": b"",
    "half a file": _half(),
    "3.6 gigapixels": giant(60_000),
    "100 megapixels": giant(10_000),
    # Pillow would hand this to an interpreter of PostScript.
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nquit\n",
}
