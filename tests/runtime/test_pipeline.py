import pytest
import torch
from prebake.runtime.families import flux

IDS = torch.tensor([[3, 4, 0, 0, 0]])
IDS_2 = torch.tensor([[3, 4, 0, 0, 0, 0]])


def noise(seed):
    return flux.draw_latents((2, 4, 4), 1, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cached", [True, False])
def test_replay_equals_the_eager_loop(pipe, eager, cached):
    got = pipe("red circle", seed=7, guidance_scale=2.0, output_type="latent", cache=cached).images
    want = eager.latents(IDS, IDS_2, noise(7), 2.0, cached)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # other kernels, float32
