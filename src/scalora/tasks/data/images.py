"""Images: folders of them as rows, and a cell of a row as the picture that it names or holds."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import ScaloraError
from ...common.files import expand_user
from .source import SourceTable
from .values import shown

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of files that are images, in lower case; upper case is the same."""
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


@dataclass(frozen=True)
class ImageFile:
    """A file, and its name below the folder that was read; it is shown, and told from others, by that name."""

    path: Path
    name: str

    def __str__(self) -> str:
        return self.name


def read_image_folder(folder: Path, field: str, read: Callable[[Path], SourceTable]) -> SourceTable:
    """The images below a folder, in the column `image`, as torchvision and `datasets` lay them out.

    Each is below a folder of its class, which is in the column `label`; or a metadata file names them in `file_name`,
    beside whatever else it knows.

    Args:
        folder: what is read.
        field: the recipe's name of it, for messages.
        read: gives the rows of a table.

    Raises:
        ScaloraError: the folder has neither form, holds splits and not classes, or names an image that is not there.
    """
    if metadata := next((folder / name for name in _METADATA if (folder / name).is_file()), None):
        return _described(metadata, read(metadata))
    classes = [each for each in sorted(folder.iterdir()) if each.is_dir() and not each.name.startswith(".")]
    files = {each.name: _images(each) for each in classes}
    deep = any(each.is_dir() for label in classes for each in label.iterdir())
    if deep and all(name.lower() in _SPLITS for name in files):
        raise ScaloraError(
            f"{field}: {folder} holds the splits {', '.join(files)}, and no classes: name the folder of one of them, "
            f"as {folder.name}/{next(iter(files))}"
        )
    table = SourceTable([], [], [])
    for label, paths in files.items():
        for path in paths:
            name = path.relative_to(folder).as_posix()
            table.rows.append({"image": ImageFile(path, name), "label": label})
            table.names.append(name)
    if not table.rows:
        raise ScaloraError(
            f"{field}: {folder} is a folder without folders of images ({', '.join(IMAGE_ENDINGS)}), one for each "
            "class, and without a metadata.csv; give a data file, or for documents a pattern such as "
            f"{folder.name}/**/*.md"
        )
    return table


def _images(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".") and path.is_file()
    )  # fmt: skip


def _described(metadata: Path, table: SourceTable) -> SourceTable:
    if not any("file_name" in row for row in table.rows):
        raise ScaloraError(f"{metadata}: there is no column file_name, which names the images; add it")
    for row in table.rows:
        name = row.get("file_name")
        row["image"] = ImageFile(metadata.parent / name, name) if isinstance(name, str) and name.strip() else name
    return table


def image_bytes(cell: Any, folder: str, place: str) -> bytes:
    """What an image's cell holds, or the file that it names.

    Args:
        cell: an :class:`ImageFile`, a path, or a dict with `bytes` or `path`, as parquet files and the hub have it.
        folder: what relative paths start from.
        place: the row's, for messages.

    Raises:
        ScaloraError: it is none of these, or there is no such file.
    """
    if isinstance(cell, dict) and isinstance(content := cell.get("bytes"), bytes):
        return content
    named = cell.get("path") if isinstance(cell, dict) else cell
    if not isinstance(named, str | ImageFile) or "\0" in str(named) or not str(named).strip():
        raise ScaloraError(f"task.image: {shown(cell)} is no path of an image in {place}; mend or drop the row")
    path = named.path if isinstance(named, ImageFile) else expand_user(folder) / expand_user(named)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ScaloraError(
            f"task.image: the image {str(named)!r} of {place} cannot be read ({error.strerror or error}); mend or drop "
            "the row (paths are relative to task.data.folder)"
        ) from error


def open_image(content: bytes, place: str, *, small: bool = False) -> Any:
    """A picture (PIL's, RGB, turned as it says itself); `small` may lose detail, and is for looking whether it opens.

    Raises:
        ScaloraError: it is no image that can be read, or Pillow is missing.
    """
    image_library = need_pillow()
    try:
        picture = image_library.open(io.BytesIO(content))
        if small:
            picture.draft("RGB", (32, 32))
            picture.load()
            return picture
        from PIL import ImageOps

        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, image_library.DecompressionBombError) as error:
        unknown = isinstance(error, image_library.UnidentifiedImageError)  # whose text is of our own buffer
        reason = "in no format that Pillow knows" if unknown else " ".join(str(error).split())[:120]
        raise ScaloraError(f"task.image: no image can be read in {place} ({reason}); mend or drop the row") from error


def need_pillow() -> Any:
    """PIL.Image; raises ScaloraError where Pillow is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ScaloraError("task.kind 'image_classification' needs Pillow: pip install 'scalora[images]'") from error
    return Image
