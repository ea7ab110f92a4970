"""Pictures and frames in and out, side by side with diffusers' processors, and video files read back.

Equality is exact: the same pixels in the same float32 operations.
"""

import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from diffusers.video_processor import VideoProcessor
from PIL import Image

from prebake.runtime.errors import RequestError
from prebake.runtime.pictures import (
    open_picture,
    postprocess_frames,
    postprocess_pictures,
    preprocess_masks,
    preprocess_pictures,
)
from prebake.runtime.video import check_video_path, default_video_path, write_video

H, W, h, w = 24, 16, 6, 4
RED = (220, 40, 30)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def photo(rng):
    """RGBA of another size and shape than H x W, its alpha not constant."""
    return Image.fromarray(rng.integers(0, 256, (37, 51, 4), dtype=np.uint8), "RGBA")


def peer(image, *, height=H, width=W):
    # a latents' width that nothing here has: a tensor of so many channels is passed through
    processor = VaeImageProcessor(vae_scale_factor=2, do_convert_rgb=True, vae_latent_channels=99)
    return processor.preprocess(image, height=height, width=width).to(torch.float32)


def peer_mask(mask):
    """The mask as StableDiffusionInpaintPipeline processes it, then its `prepare_mask_latents`."""
    processor = VaeImageProcessor(
        vae_scale_factor=2, do_normalize=False, do_binarize=True, do_convert_grayscale=True, vae_latent_channels=99
    )
    return torch.nn.functional.interpolate(processor.preprocess(mask, height=H, width=W), size=(h, w))


def equal(ours, theirs):
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert torch.equal(ours, theirs)


# --- in ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_pil_images_are_resized_and_become_rgb(photo, mode):
    image = photo.convert("RGB").convert(mode) if mode != "RGBA" else photo
    equal(preprocess_pictures(image, H, W), peer(image))
    assert preprocess_pictures(image, H, W).shape == (1, 3, H, W)


def test_pil_images_of_different_sizes_make_a_batch(photo):
    images = [photo.convert("RGB"), photo.convert("RGB").resize((9, 70))]
    equal(preprocess_pictures(images, H, W), peer(images))


def test_all_256_levels_are_equal_without_a_resize():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    equal(preprocess_pictures(image, 16, 16), peer(image, height=16, width=16))
    equal(preprocess_pictures(np.array(image), 16, 16), peer(image, height=16, width=16))


@pytest.mark.parametrize("size", [(H, W), (37, 51)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_are_resized_by_nearest_pixels(rng, size, dtype):
    batch = rng.random((2, *size, 3)).astype(dtype)
    for image in (batch, batch[0], list(batch), [batch, batch]):
        theirs = np.concatenate(image) if isinstance(image, list) and image[0].ndim == 4 else image
        equal(preprocess_pictures(image, H, W), peer(theirs))


@pytest.mark.parametrize("size", [(H, W), (37, 51)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_resized_by_nearest_pixels(rng, size, dtype):
    batch = torch.from_numpy(rng.random((2, 3, *size))).to(dtype)
    for image in (batch, batch[0][None], list(batch)):
        equal(preprocess_pictures(image, H, W), peer(image))
    equal(preprocess_pictures(batch[0], H, W), peer(batch[:1]))  # there it must be in a batch or a list


def test_uint8_holds_what_pil_holds(photo):
    """diffusers takes uint8 arrays for 0..1 without a word, and so makes a picture of them that nobody meant."""
    array = np.array(photo.convert("RGB").resize((W, H)))
    expected = peer(array.astype(np.float32) / 255)
    equal(preprocess_pictures(array, H, W), expected)
    equal(preprocess_pictures(torch.from_numpy(array).permute(2, 0, 1), H, W), expected)
    equal(preprocess_pictures(array[:, ::-1], H, W), expected.flip(-1))


def test_values_below_0_mean_that_the_range_is_already_normalized(rng):
    image = torch.from_numpy(rng.random((1, 3, H, W))).float() * 2 - 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = preprocess_pictures(image, H, W)
    assert ["its range is taken for -1..1" in str(c.message) for c in caught] == [True]
    equal(ours, peer(image))
    assert torch.equal(ours, image)


def test_a_changed_pixel_is_seen(photo):
    other = photo.convert("RGB")
    other.putpixel((20, 20), tuple(255 - c for c in other.getpixel((20, 20))))
    assert not torch.equal(preprocess_pictures(other, H, W), peer(photo.convert("RGB")))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("photo.png", "expected a PIL image, an array, a tensor or a list of them, got str"),
        ([], "got an empty list"),
        (np.zeros((H, W)), r"expected an array \[H, W, 3\] or \[B, H, W, 3\], got \[24, 16\]"),
        (np.zeros((3, H, W)), r"got \[3, 24, 16\]"),
        (torch.zeros(1, 4, H, W), r"expected a tensor \[3, H, W\] or \[B, 3, H, W\], got \[1, 4, 24, 16\]"),
        (np.zeros((H, W, 3), dtype=np.int64), "expected floats in 0..1 or uint8, got int64"),
        (np.full((H, W, 3), 200.0), "expected floats in 0..1, got up to 200; divide by 255, or give uint8"),
    ],
)
def test_what_is_no_picture_is_refused(image, words):
    with pytest.raises(RequestError, match=words):
        preprocess_pictures(image, H, W)


def test_files_open_as_load_image_opens_them(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    photo.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    photo.save(tmp_path / "clear.png")
    for name, size in (("turned.jpg", (37, 51)), ("clear.png", (51, 37))):
        ours = open_picture(tmp_path / name)
        assert (ours.mode, ours.size) == ("RGB", size)
        assert ours.tobytes() == load_image(str(tmp_path / name)).tobytes()


def test_a_file_without_a_picture_is_refused(photo, tmp_path):
    (tmp_path / "words.png").write_text("not a picture")
    photo.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name in ("words.png", "half.png", "absent.png", "."):
        with pytest.raises(RequestError, match=r"expected a picture, such as a .png or.*give another file"):
            open_picture(tmp_path / name)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1"])
def test_pil_masks_are_resized_made_grey_and_cut(photo, mode):
    mask = photo.convert(mode)
    equal(preprocess_masks(mask, H, W, h, w), peer_mask(mask))
    equal(preprocess_masks([mask, mask.rotate(90)], H, W, h, w), peer_mask([mask, mask.rotate(90)]))


@pytest.mark.parametrize("size", [(H, W), (37, 51)])
def test_array_and_tensor_masks(rng, size):
    batch = rng.random((2, *size)).astype(np.float32)
    batch[0, ::3] = 0.5  # the edge belongs to what is painted
    t = torch.from_numpy(batch)
    arrays = (batch, batch[0], batch[..., None], batch[0][..., None], list(batch))
    tensors = (t, t[0], t[:, None], t[:1], list(t), list(t[:, None]))
    for mask in arrays + tensors:
        theirs = mask.copy() if isinstance(mask, np.ndarray) else mask.clone() if torch.is_tensor(mask) else mask
        equal(preprocess_masks(mask, H, W, h, w), peer_mask(theirs))
    assert set(preprocess_masks(batch, H, W, h, w).unique().tolist()) == {0.0, 1.0}


def test_binary_masks_mean_the_same_in_every_type(rng):
    """diffusers agrees for uint8; soft uint8 masks it would paint wherever they are not 0."""
    mask = rng.random((H, W)) > 0.4
    expected = peer_mask(mask.astype(np.float32))
    for given in (mask, mask.astype(np.uint8), mask.astype(np.uint8) * 255, torch.from_numpy(mask)):
        equal(preprocess_masks(given, H, W, h, w), expected)
    assert torch.equal(peer_mask(mask.astype(np.uint8) * 255).float(), expected)
    soft = (rng.random((H, W)) * 255).astype(np.uint8)
    equal(preprocess_masks(soft, H, W, h, w), peer_mask(Image.fromarray(soft)))


def test_a_mask_of_the_pixels_and_the_caller_s_stays_as_it_is(rng):
    mask = rng.random((1, 1, H, W)).astype(np.float32)
    before = torch.from_numpy(mask.copy())
    assert torch.equal(preprocess_masks(torch.from_numpy(mask), H, W, H, W), (before >= 0.5).float())
    assert torch.equal(torch.from_numpy(mask), before)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (
            np.zeros((H, W, 3)),
            r"mask_image: expected an array \[H, W\], \[B, H, W\] or \[B, H, W, 1\], got \[24, 16, 3\]",
        ),
        (np.zeros((1, H, W, 3)), r"got \[1, 24, 16, 3\]"),
        (torch.zeros(1, 3, H, W), r"expected a tensor .*, got \[1, 3, 24, 16\]"),
        (np.zeros((H, W), dtype=np.int64), "expected floats in 0..1, bool or uint8, got int64"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_mask_is_refused(mask, words):
    with pytest.raises(RequestError, match=words):
        preprocess_masks(mask, H, W, h, w)


# --- out --------------------------------------------------------------------------------------------------------------


def as_decoded(rng, *shape, dtype=torch.float32):
    """In -1..1 and a bit beyond, as diffusers' decoders give it, and in 0..1, as ours do, who denormalize like its processors."""
    x = torch.from_numpy(rng.uniform(-1.1, 1.1, shape)).to(dtype)
    return x, (x * 0.5 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_come_out_as_from_diffusers(rng, dtype):
    theirs, ours = as_decoded(rng, 2, 3, H, W, dtype=dtype)
    processor = VaeImageProcessor()
    assert torch.equal(postprocess_pictures(ours, "pt"), processor.postprocess(theirs, "pt"))
    assert np.array_equal(postprocess_pictures(ours, "np"), processor.postprocess(theirs, "np"))
    images = postprocess_pictures(ours, "pil")
    assert [i.tobytes() for i in images] == [i.tobytes() for i in processor.postprocess(theirs, "pil")]
    assert (len(images), images[0].mode, images[0].size) == (2, "RGB", (W, H))


def test_frames_come_out_as_from_diffusers(rng):
    theirs, ours = as_decoded(rng, 2, 5, 3, H, W)
    theirs = theirs.transpose(1, 2)  # [B, C, T, H, W]
    processor = VideoProcessor()
    assert torch.equal(postprocess_frames(ours, "pt"), processor.postprocess_video(theirs, "pt"))
    assert np.array_equal(postprocess_frames(ours, "np"), processor.postprocess_video(theirs, "np"))
    videos, peers = postprocess_frames(ours, "pil"), processor.postprocess_video(theirs, "pil")
    assert [len(v) for v in videos] == [5, 5]
    assert [[f.tobytes() for f in v] for v in videos] == [[f.tobytes() for f in v] for v in peers]
    assert videos[0][0].tobytes() != videos[0][1].tobytes()


# --- files of frames --------------------------------------------------------------------------------------------------


def moving(count, size=(W, H)):
    """A red picture in which a white bar falls by a line per frame."""
    frames = [Image.new("RGB", size, RED) for _ in range(count)]
    for i, frame in enumerate(frames):
        frame.paste((255, 255, 255), (0, i, size[0], i + 2))
    return frames


@pytest.mark.parametrize(("fps", "pauses"), [(8, {120, 130}), (10, {100}), (30, {30, 40}), (50, {20})])
def test_a_gif_has_the_frames_and_lasts_as_long_as_they_do(tmp_path, fps, pauses):
    write_video(moving(16), tmp_path / "x.gif", fps=fps)
    with Image.open(tmp_path / "x.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (16, (W, H), 0)
        told, rows = [], []
        for i in range(16):
            gif.seek(i)
            told.append(gif.info["duration"])
            rows.append(int(np.array(gif.convert("RGB"))[:, 0, 2].argmax()))
    assert set(told) == pauses
    assert abs(sum(told) - 16_000 / fps) <= 5  # half of the format's 1/100 s, for the last frame alone
    assert rows == list(range(16))


def test_an_mp4_has_the_frames_their_rate_and_their_colours(tmp_path):
    av = pytest.importorskip("av", reason="needs the extra `video`")
    write_video(moving(9, (64, 48)), tmp_path / "x.mp4", fps=12)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.codec_context.name, stream.codec_context.pix_fmt) == (12, "h264", "yuv420p")
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
        assert float(stream.duration * stream.time_base) == 9 / 12
    assert [f.shape for f in frames] == [(48, 64, 3)] * 9
    below = np.stack([f[16:].mean((0, 1)) for f in frames])
    # of 255: 8 bits of luma and chroma in a narrower range, and crf 17; colours named by the wrong standard are 18 off
    assert np.abs(below - RED).max() < 4
    assert frames[4][5, 5].min() > 230  # the bar


def test_the_name_says_what_is_written(tmp_path, monkeypatch):
    frames = moving(2)
    for name, fps, words in [
        ("x.png", 8, "a video is written to a file that ends in .mp4 or .gif"),
        ("x.gif", 51, "expected 1 to 50, the most that a .gif can play frames per second, got 51"),
        ("x.gif", 0, "got 0"),
        ("absent/x.gif", 8, "the video could not be written: .*; give a name in a folder that exists"),
    ]:
        with pytest.raises(RequestError, match=words):
            write_video(frames, tmp_path / name, fps=fps)
    with pytest.raises(RequestError, match="expected one frame or more"):
        write_video([], tmp_path / "x.gif")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RequestError, match=r"'prebake\[video\]', or .*name that ends in .gif"):
        check_video_path(tmp_path / "x.mp4", 8)
    assert default_video_path().name == "video.gif"


def test_an_mp4_of_odd_size_or_in_no_folder_is_refused(tmp_path):
    pytest.importorskip("av", reason="needs the extra `video`")
    assert default_video_path().name == "video.mp4"
    with pytest.raises(RequestError, match=r"an .mp4 has an even width and height, the.*give a .gif"):
        write_video(moving(2, (15, 24)), tmp_path / "x.mp4")
    with pytest.raises(RequestError, match="could not be written"):
        write_video(moving(2), tmp_path / "absent/x.mp4")
