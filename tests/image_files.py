"""Images for tests, made on the spot."""

import io
import struct

import numpy as np
from PIL import Image


def smooth_image(width=160, height=120, seed=0) -> Image.Image:
    """An RGB image without sharp edges, different in every corner, so that turns and shifts show."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 1, width)[None, :, None]
    y = np.linspace(0, 1, height)[:, None, None]
    phase = rng.uniform(0, 2 * np.pi, 3)
    values = 60 + 90 * x + 60 * y**2 + 25 * np.sin(9 * x + 5 * y + phase)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def coordinate_image(width, height) -> Image.Image:
    """Red is the column, green the row: at most 256 pixels each way."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def encoded(image, file_format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


PNG = encoded(smooth_image(8, 8))


def put(root, *names, data=PNG):
    """Files of these names below root, all with the same bytes."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_folder(root, count, size=(48, 40), classes=("ant", "bee"), file_format="PNG", extension=".png"):
    """`count` small images spread over class folders (or none), distinct by content."""
    for number in range(count):
        folder = root / classes[number % len(classes)] if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        data = encoded(smooth_image(*size, seed=number), file_format)
        (folder / f"{number:03d}{extension}").write_bytes(data)
    return root


def bad_files() -> dict[str, bytes]:
    """Name -> content of files that look like images by name and cannot be decoded."""
    jpeg = encoded(smooth_image(), "JPEG")
    png = encoded(smooth_image())
    return {
        "empty.jpg": b"",
        "text.jpeg": b"this is not an image\n",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "header_only.JPG": jpeg[:20],
        "page.png": b"<html><body>404</body></html>",
        "ghost.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "float.tiff": encoded(Image.new("F", (20, 20), 0.5), "TIFF"),
    }


def tiff(values, photometric, extra_samples=(), bits=None) -> bytes:
    """A plain little-endian TIFF of `values` [h, w, bands], uint8 or uint16 (TIFF 6.0, sections 2 and 8).

    With `bits` 12, rows of an even number of uint16 values are packed to 12 bits each.
    """
    height, width, bands = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    bits = [bits or values.itemsize * 8] * bands
    tags = {256: [width], 257: [height], 258: bits, 259: [1], 262: [photometric], 273: [0], 277: [bands]}
    tags |= {278: [height], 279: [len(data)]} | ({338: list(extra_samples)} if extra_samples else {})
    packed = {tag: struct.pack(f"<{len(numbers)}I", *numbers) for tag, numbers in tags.items()}
    tail = 8 + 2 + 12 * len(tags) + 4  # where values that do not fit into the directory lie
    outside = {tag: content for tag, content in packed.items() if len(content) > 4}
    packed[273] = struct.pack("<I", tail + sum(map(len, outside.values())))
    directory, place = b"", tail
    for tag, content in packed.items():
        directory += struct.pack("<HHI", tag, 4, len(content) // 4)
        directory += content if tag not in outside else struct.pack("<I", place)
        place += len(content) if tag in outside else 0
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4)
    return head + b"".join(outside.values()) + data
