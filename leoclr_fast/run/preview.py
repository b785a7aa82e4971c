"""A contact sheet of the views that training sees: look before you train."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dataset_tools.files import write_file
from dataset_tools.sources import Split
from pipelines.augment import augmented_views
from pipelines.batch import CropBatch
from pipelines.config import LoaderConfig, ViewConfig
from pipelines.decode import decode_rgb
from pipelines.order import TrainOrder
from pipelines.torchvision_loader import TorchvisionLoader
from pipelines.views import ViewRecipe

_CELL = 160
_GAP = 8
_CAPTION = 20
_BOX_COLOURS = ((255, 255, 255), (255, 176, 0), (0, 190, 255))


def write_preview(path: Path, split: Split, views: ViewRecipe, config: ViewConfig, *, seed: int, rows: int = 8) -> int:
    """Write a PNG with a row for each image: the original with the boxes of its crops, then every augmented view.

    The images, boxes and augmentations are those of the first batch that a training run with this seed would see.
    Returns the number of rows. Raises ValueError if `path` does not end in .png, OSError if it cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path} is not a PNG file; give a name that ends in .png")
    rows = min(rows, len(split))
    order = TrainOrder(num_images=len(split), batch_size=rows, seed=seed)
    device = torch.device("cpu")
    with TorchvisionLoader(split, views, config, LoaderConfig(workers=0), order, seed=seed, device=device) as loader:
        batch = next(iter(loader.batches(0)))
        augmented = augmented_views(batch, views, config, seed=seed)
    sheet = _contact_sheet(split, views, config, batch, augmented)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue())
    return rows


def _contact_sheet(
    split: Split, views: ViewRecipe, config: ViewConfig, batch: CropBatch, augmented: tuple[Tensor, ...]
) -> Image.Image:
    columns = 1 + len(views)
    rows = len(batch.indices)
    pitch = _CELL + _GAP
    sheet = Image.new("RGB", (columns * pitch + _GAP, _CAPTION + rows * pitch + _GAP), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    captions = ["image and crop boxes", *(f"{'key' if n else 'query'}: {view.name}" for n, view in enumerate(views))]
    for column, caption in enumerate(captions):
        colour = (220, 220, 220) if column == 0 else _BOX_COLOURS[views[column - 1].number % len(_BOX_COLOURS)]
        draw.text((_GAP + column * pitch, 3), caption, fill=colour, font=font)
    for row, index in enumerate(batch.indices):
        top = _CAPTION + row * pitch
        boxes = batch.boxes[row]
        sheet.paste(_with_boxes(decode_rgb(split, int(index)), views, boxes, config.image_size), (_GAP, top))
        for column, view in enumerate(augmented, start=1):
            picture = Image.fromarray(_denormalised(view[row], config)).resize((_CELL, _CELL), Image.Resampling.NEAREST)
            sheet.paste(picture, (_GAP + column * pitch, top))
    return sheet


def _with_boxes(image: Image.Image, views: ViewRecipe, boxes: npt.NDArray[np.int32], view_size: int) -> Image.Image:
    """The image fitted into a cell, with what each view shows of it, where that is not the whole image."""
    cell = Image.new("RGB", (_CELL, _CELL), (24, 24, 24))
    scale = _CELL / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    corner = (_CELL - size[0]) // 2, (_CELL - size[1]) // 2
    cell.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    draw = ImageDraw.Draw(cell)
    for view, box in zip(views, boxes.astype(np.float64), strict=True):
        begin = box[:2] + box[2:4] * np.maximum(box[6:], 0) / box[4:6]
        end = box[:2] + box[2:4] * np.minimum(box[6:] + view_size, box[4:6]) / box[4:6]
        if (end - begin == (image.height, image.width)).all():
            continue
        (top, left), (bottom, right) = begin * scale, end * scale
        x, y = corner[0] + left, corner[1] + top
        corners = (x, y, max(x, corner[0] + right - 1), max(y, corner[1] + bottom - 1))
        draw.rectangle(corners, outline=_BOX_COLOURS[view.number % len(_BOX_COLOURS)], width=2)
    return cell


def _denormalised(view: Tensor, config: ViewConfig) -> npt.NDArray[np.uint8]:
    """[3, S, S] normalised -> uint8 [S, S, 3]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    pixels = (view.float().cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 0).numpy()
