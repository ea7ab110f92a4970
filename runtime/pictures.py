"""Pictures in and out: what a caller has, as a graph wants it, and what the decoder gives, as a caller asks for it.

    open_picture(path) -> Image                                                     RGB, upright
    pictures_in(image, height, width) -> Tensor                                     [B, 3, H, W] in -1..1
    masks_in(mask, height, width, latent_height, latent_width) -> Tensor            [B, 1, h, w] of 0 and 1
    pictures_out(images, output_type) -> list[Image] | ndarray | Tensor             from [B, 3, H, W] in 0..1
    frames_out(videos, output_type) -> list[list[Image]] | ndarray | Tensor         from [B, T, 3, H, W] in 0..1

The numbers are those of diffusers' VaeImageProcessor and VideoProcessor, bit for bit. Pictures go in as its `preprocess`
returns them, in -1..1: mapped to 0..1 and back they would differ in the last bit. Letters: B pictures, T frames, H and W
pixels, h and w of the latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from .errors import RequestError

Picture = Image.Image | np.ndarray | torch.Tensor
Pictures = Picture | Sequence[Picture]


def open_picture(path: str | Path) -> Image.Image:
    """The file's picture in RGB, turned as its EXIF data says, as diffusers' `load_image` does.

    Raises RequestError for what is not a picture.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # SyntaxError is what Pillow raises for some broken files
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise RequestError(f"{path}: expected a picture, such as a .png or .jpg, but {e}; give another file") from e


def preprocess_pictures(image: Pictures, height: int, width: int) -> torch.Tensor:
    """The picture or pictures, resized: float32 [B, 3, H, W] in -1..1, as `VaeImageProcessor.preprocess` has them.

    PIL images (of any mode, as RGB) are resized with LANCZOS; arrays [H, W, 3] or [B, H, W, 3] and tensors [3, H, W] or
    [B, 3, H, W] by their nearest pixels. Those hold floats in 0..1, or uint8. As in diffusers, floats with a value below
    0 are taken for -1..1, with a warning. Raises RequestError for other shapes, types and ranges.
    """
    x = torch.cat([_resize(_rgb_tensor(each, height, width), height, width) for each in _picture_list(image, "image")])
    if (highest := x.max().item()) > 2:  # a resize overshoots 1 by less
        raise RequestError(f"image: expected floats in 0..1, got up to {highest:g}; divide by 255, or give uint8")
    if x.min() < 0:
        warnings.warn(f"image: the lowest value is {x.min():.3g}, so its range is taken for -1..1", stacklevel=2)
    else:
        x = 2.0 * x - 1.0
    return x.to(torch.float32).contiguous()


def preprocess_masks(mask: Pictures, height: int, width: int, latent_height: int, latent_width: int) -> torch.Tensor:
    """Where to paint anew, for latents: float32 [B, 1, h, w] of 1 (paint) and 0 (keep).

    As diffusers' inpainting pipelines do: resized to H x W, made grey, cut at 0.5, and only then brought to h x w by the
    nearest pixels; with h = H and w = W it is the mask of the pixels. PIL images of any mode; arrays [H, W], [B, H, W] or
    [..., 1] and tensors [H, W], [B, H, W] or [B, 1, H, W] of floats in 0..1, bool or uint8. Raises RequestError for other
    shapes and types.
    """
    x = torch.cat(
        [_resize(_grey_tensor(each, height, width), height, width) for each in _picture_list(mask, "mask_image")]
    )
    return interpolate((x >= 0.5).to(torch.float32), size=(latent_height, latent_width)).contiguous()


def postprocess_pictures(images: torch.Tensor, output_type: str) -> Any:
    """[B, 3, H, W] in 0..1 as a list of PIL images ("pil"), floats [B, H, W, 3] ("np") or as it is ("pt")."""
    return _postprocess(images, output_type, _pil_images)


def postprocess_frames(videos: torch.Tensor, output_type: str) -> Any:
    """[B, T, 3, H, W] in 0..1 as a list of PIL images for each video ("pil"), floats [B, T, H, W, 3] ("np"), or as it is
    ("pt"), like `VideoProcessor.postprocess_video`."""
    return _postprocess(videos, output_type, lambda array: [_pil_images(video) for video in array])


def _postprocess(x: torch.Tensor, output_type: str, as_pil: Callable[[np.ndarray], list[Any]]) -> Any:
    if output_type == "pt":
        return x
    array = x.movedim(-3, -1).float().cpu().numpy()  # [..., H, W, 3]
    return array if output_type == "np" else as_pil(array)


def _pil_images(array: np.ndarray) -> list[Image.Image]:
    """Floats [N, H, W, 3] in 0..1 as N images."""
    return [Image.fromarray(x) for x in (array * 255).round().astype(np.uint8)]


# --- one picture or batch of them, as [B, C, H, W] --------------------------------------------------------------------


def _picture_list(given: Pictures, argument: str) -> list[Picture]:
    each: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    if not each or not all(isinstance(x, Picture) for x in each):
        got = ", ".join(sorted({type(x).__name__ for x in each})) or "an empty list"
        raise RequestError(f"{argument}: expected a PIL image, an array, a tensor or a list of them, got {got}")
    return each


def _rgb_tensor(x: Picture, height: int, width: int) -> torch.Tensor:
    """[B, 3, H, W]: floats as they are, of other types in 0..1. Arrays and tensors keep their size."""
    if isinstance(x, Image.Image):
        return _pil_pixels(x, height, width, "RGB").permute(2, 0, 1)[None]
    last = isinstance(x, np.ndarray)  # channels come last in arrays
    t = _array_tensor(x)
    t = t[None] if t.ndim == 3 else t
    t = t.movedim(-1, 1) if last and t.ndim == 4 else t
    if t.ndim != 4 or t.shape[1] != 3:
        expected = "an array [H, W, 3] or [B, H, W, 3]" if last else "a tensor [3, H, W] or [B, 3, H, W]"
        raise RequestError(f"image: expected {expected}, got {list(x.shape)}")
    if t.dtype != torch.uint8 and not t.is_floating_point():
        raise RequestError(f"image: expected floats in 0..1 or uint8, got {x.dtype}")
    return t / 255.0 if t.dtype == torch.uint8 else t


def _grey_tensor(x: Picture, height: int, width: int) -> torch.Tensor:
    """[B, 1, H, W], with 0.5 as the middle. Arrays and tensors keep their size."""
    if isinstance(x, Image.Image):
        return _pil_pixels(x, height, width, "L")[None, None]
    last = isinstance(x, np.ndarray)
    t = _array_tensor(x)
    t = t[None] if last and t.ndim == 3 and t.shape[-1] in (3, 4) else t  # in colour, not H masks of a width of 3
    t = t.movedim(-1, -3) if last and t.ndim in (3, 4) and t.shape[-1] == 1 else t  # [1, H, W] or [B, 1, H, W]
    t = t.reshape(-1, 1, *t.shape[-2:]) if t.ndim in (2, 3) else t
    if t.ndim != 4 or t.shape[1] != 1:
        expected = (
            "an array [H, W], [B, H, W] or [B, H, W, 1]" if last else "a tensor [H, W], [B, H, W] or [B, 1, H, W]"
        )
        raise RequestError(f"mask_image: expected {expected}, got {list(x.shape)}")
    if t.dtype == torch.uint8:  # both customs are in use: 0 and 255, as image files have it, or 0 and 1
        return t / 255.0 if t.max() > 1 else t.float()
    if t.dtype != torch.bool and not t.is_floating_point():
        raise RequestError(f"mask_image: expected floats in 0..1, bool or uint8, got {x.dtype}")
    return t.float() if t.dtype == torch.bool else t


def _pil_pixels(image: Image.Image, height: int, width: int, mode: str) -> torch.Tensor:
    """float32 [H, W, 3] or [H, W] in 0..1. Resized in the mode that it has, and only then converted, as in diffusers."""
    resized = image.resize((width, height), resample=Image.Resampling.LANCZOS).convert(mode)
    return _array_tensor(np.array(resized)) / 255.0


def _array_tensor(x: np.ndarray | torch.Tensor) -> torch.Tensor:
    # a copy in C order: torch takes no negative strides, and warns of arrays that nobody may write to
    return torch.from_numpy(np.array(x, order="C")) if isinstance(x, np.ndarray) else x


def _resize(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return x if x.shape[-2:] == (height, width) else interpolate(x, size=(height, width))
