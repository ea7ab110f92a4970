"""The UNet's training in small: its batches, and convolutions that Muon moves as matrices."""

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from prebake.exporter.shapes import MODEL_FOLDER, unet


@pytest.fixture
def pool() -> unet.UNetPool:
    empty, *ids = unet.tokenize_prompts(
        CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer"), ["", "a circle", "a shape"]
    )
    return unet.UNetPool(torch.zeros(10, 4, 16, 16).half(), torch.stack(ids).expand(10, 2, 32), empty)


def test_a_tenth_of_a_batch_has_the_empty_caption_and_some_a_looser_one(pool):
    seen = torch.cat([pool.batch(np.random.default_rng(i))[1] for i in range(100)])
    assert seen.shape == (100 * unet.BATCH, 32)
    shares = [(seen == ids).all(1).float().mean().item() for ids in (pool.empty, pool.ids[0, 0], pool.ids[0, 1])]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx(
        [
            unet.EMPTY_SHARE,
            (1 - unet.EMPTY_SHARE) * (1 - unet.LOOSER_SHARE),
            (1 - unet.EMPTY_SHARE) * unet.LOOSER_SHARE,
        ],
        abs=0.02,
    )


def test_an_untrained_unet_predicts_nothing():
    with torch.inference_mode():
        v = unet.predict_v(
            unet.build_unet(), torch.randn(2, 4, 16, 16), torch.tensor([0, 839]), torch.randn(2, 32, 128)
        )
    assert torch.equal(v, torch.zeros(2, 4, 16, 16))


def test_every_parameter_is_trained_once_and_kernels_move_with_their_matrices():
    denoiser = unet.build_unet()
    muon, adam = unet.optimisers(denoiser, 1e-2)
    owned = [p for o in (muon, adam) for group in o.param_groups for p in group["params"]]
    assert sum(p.numel() for p in owned) == sum(p.numel() for p in denoiser.parameters())
    kernel = denoiser.mid_block.resnets[0].conv1.weight
    before = kernel.detach().clone()
    for p in denoiser.parameters():
        p.grad = torch.ones_like(p)
    muon.step()
    adam.step()
    assert kernel.ndim == 4
    assert not torch.equal(kernel, before)
    assert kernel.grad is None
    muon.zero_grad(set_to_none=True)
    adam.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in denoiser.parameters())
