"""The sheet: prompts x (eager, artifact, 8 x difference) in one picture, so that a person can see what the figures mean.

Of a video its first, middle and last frame are shown, side by side. The PNG says in a text chunk what its cells show, so
that `page/` can take them apart again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from ...runtime.manifest import Manifest
from ...runtime.plan import Plan
from .closeness import psnr_db
from .comparison import PictureRow

DIFFERENCE_GAIN = 8  # of the difference
GAP, LINE, FONT_SIZE = 8, 18, 13
MAX_PICTURE_HEIGHT = 224  # pixels of a shown picture, so that six rows stay under 1600
PNG_CHUNK = "prebake"  # of the PNG's text


def sheet_plans(manifest: Manifest, plans: Mapping[str, Plan]) -> tuple[Plan, ...]:
    """The plans of the default number of steps, without cache first."""
    drawn = [p for p in plans.values() if p.size is None]
    mine = [p for p in drawn if p.steps == manifest.defaults.num_inference_steps] or drawn[:2]
    return tuple(sorted(mine, key=lambda p: p.cache != "none"))


def draw_sheet(rows: Sequence[PictureRow], plans: Sequence[Plan]) -> Image.Image:
    """A row for each prompt, and eager beside each plan's picture and their difference, times 8, black where equal."""
    headings = [f"eager, {plans[0].steps} steps"]
    for plan in plans:
        headings += [
            f"artifact, {'uncached' if plan.cache == 'none' else 'cache ' + plan.cache}",
            f"difference x {DIFFERENCE_GAIN}",
        ]
    cells = [[scale_picture(picture) for picture in row_pictures(row, plans)] for row in rows]
    width, height = cells[0][0].size
    size = (GAP + len(headings) * (width + GAP), GAP + LINE + len(rows) * (height + LINE + 2 * GAP))
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    for column, heading in enumerate(headings):
        draw.text((GAP + column * (width + GAP), GAP), heading, "black", font)
    for r, (row, line) in enumerate(zip(rows, cells, strict=True)):
        y = GAP + LINE + r * (height + LINE + 2 * GAP)
        draw.text((GAP, y + GAP), fit_text(f"{row.prompt}  (seed {row.seed})", size[0] - 2 * GAP, font), "black", font)
        for column, picture in enumerate(line):
            image.paste(picture, (GAP + column * (width + GAP), y + GAP + LINE))
    return image


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet: eager's picture, and by plan the artifact's, the difference, and its PSNR before rounding."""

    prompt: str
    seed: int
    eager: Image.Image
    plans: Mapping[str, tuple[Image.Image, Image.Image, float]]


def save_sheet(rows: Sequence[PictureRow], plans: Sequence[Plan], file: Path | BinaryIO) -> None:
    """The sheet as a PNG that `read_sheet` reads."""
    picture = rows[0].eager[plans[0].steps].image
    cell = scale_picture(picture)
    enlarged = max(1, cell.height // picture.shape[-2])
    said = {
        "cell": cell.size,
        "enlarged": enlarged,
        "plans": [plan.name for plan in plans],
        "rows": [
            [r.prompt, r.seed, [psnr_db(r.plans[p.name].image, r.eager[p.steps].image) for p in plans]] for r in rows
        ],
    }
    chunk = PngInfo()
    chunk.add_itxt(PNG_CHUNK, json.dumps(said), zip=True)
    draw_sheet(rows, plans).save(file, "PNG", pnginfo=chunk)


def read_sheet(file: Path | BinaryIO) -> tuple[SheetRow, ...]:
    """The rows of a sheet, pictures as small as they were drawn; none of a sheet of before it said what its cells show.

    Raises ValueError for what is no sheet.
    """
    image = Image.open(file)
    if not isinstance(image, PngImageFile):
        raise ValueError("it is no PNG")
    if PNG_CHUNK not in image.text:
        return ()
    said = json.loads(image.text[PNG_CHUNK])
    try:
        (width, height), enlarged, plans = said["cell"], int(said["enlarged"]), said["plans"]
        small = (width // enlarged, height // enlarged)

        def cell(row: int, column: int) -> Image.Image:
            x, y = GAP + column * (width + GAP), 2 * (GAP + LINE) + row * (height + LINE + 2 * GAP)
            if x + width > image.width or y + height > image.height:
                raise ValueError("its cells are not inside")
            return image.crop((x, y, x + width, y + height)).resize(small, Image.Resampling.NEAREST)

        return tuple(
            SheetRow(
                str(prompt),
                int(seed),
                cell(r, 0),
                {p: (cell(r, 1 + 2 * i), cell(r, 2 + 2 * i), float(db[i])) for i, p in enumerate(plans)},
            )
            for r, (prompt, seed, db) in enumerate(said["rows"])
        )
    except (KeyError, TypeError, IndexError, ZeroDivisionError) as e:
        raise ValueError("what it says of its cells is damaged") from e


def row_pictures(row: PictureRow, plans: Sequence[Plan]) -> list[Tensor]:
    """Eager, then picture and difference of each plan, [1, 3, H, W] in 0..1, or videos [1, T, 3, H, W]."""
    shown = [row.eager[plans[0].steps].image]
    for plan in plans:
        ours = row.plans[plan.name].image
        shown += [ours, (DIFFERENCE_GAIN * (ours - row.eager[plan.steps].image).abs()).clamp(0, 1)]
    return shown


def scale_picture(picture: Tensor) -> Image.Image:
    """Enlarged a whole number of times to 224 pixels or less, pixels kept square; shrunk to 224 if it is taller. Of a video
    three frames side by side, half as tall."""
    video = picture.dim() == 5
    still = torch.cat([picture[:, t] for t in sheet_frames(picture.shape[1])], dim=-1) if video else picture
    array = (still[0].permute(1, 2, 0).float().cpu().nan_to_num() * 255).round().to(torch.uint8).numpy()
    image, tallest = Image.fromarray(array), MAX_PICTURE_HEIGHT // 2 if video else MAX_PICTURE_HEIGHT
    times = tallest // image.height
    if times:
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return image.resize((round(image.width * tallest / image.height), tallest), Image.Resampling.LANCZOS)


def sheet_frames(frames: int) -> list[int]:
    """The first, the middle and the last of them, as far as they are different ones."""
    return sorted({0, frames // 2, frames - 1})


def fit_text(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, its end cut off where it is wider than `width` pixels."""
    while len(text) > 4 and font.getlength(text) > width:
        text = text[:-4].rstrip() + "..."
    return text
