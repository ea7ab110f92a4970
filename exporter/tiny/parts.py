"""What the tiny pipelines are made of: seeded weights, tokenizers, text encoders and a VAE.

Weights are drawn from NumPy's legacy generator, whose stream never changes, and only uniformly, so that no library's
logarithm enters: the same seed gives the same bytes on every machine.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.embeddings import TimestepEmbedding
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKEN_WORDS = tuple(
    """
a an the of on in at with and by under above left right next to from for is
large small big tiny red blue green yellow white black orange purple pink brown grey golden dark bright
circle square triangle star heart ring cross ball cube background picture photo painting drawing
cat dog horse bird fish man woman child robot astronaut tree flower house city street mountain sea river forest moon sun
sky night day snow rain fire light mars car boat train hat chair table book apple running riding sitting flying
blurry ugly low quality detailed beautiful old new
""".split()  # noqa: SIM905
)
CLIP_TOKENS = 16

Module = TypeVar("Module", bound=nn.Module)


def seed_weights(module: Module, seed: int, gain: float = 1.0) -> Module:
    """`module` in eval mode with drawn weights: a layer of it gives its input's variance times `gain` squared.

    Norms keep 1 and 0. Other biases are small, so that zeros do not stay zeros.
    """
    draw = np.random.RandomState(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                shape = tuple(parameter.shape)
                if len(shape) > 1:
                    fan_in = 4 if isinstance(part, nn.Embedding) else parameter.numel() // shape[0]
                    bound = gain * (3 / fan_in) ** 0.5
                elif name.endswith("bias") and not is_norm(part):
                    bound = 0.1
                else:
                    continue
                parameter.copy_(torch.from_numpy(bound * draw.uniform(-1.0, 1.0, shape)))
        for part in module.modules():
            if isinstance(part, TimestepEmbedding):
                part.linear_1.weight.mul_(slow_factors(part.linear_1.in_features))
    return module.eval()


def slow_factors(channels: int) -> torch.Tensor:
    """Factors [channels] for the sinusoids of a time, both halves alike: the fast ones are weak, as in trained models.

    Else what bfloat16 makes of a time (guidance 3.5 is 3504 in place of 3500 thousandths) would be another model.
    """
    half = channels // 2
    frequencies = torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    return (1.5 / (1 + 100 * frequencies)).float().repeat(2)


def is_norm(part: nn.Module) -> bool:
    return "Norm" in type(part).__name__


def scale_layer(layer: Any, factor: float) -> None:
    """Multiplies weight and bias, so that the layer's output is `factor` times what it was."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(factor)


def clip_tokenizer(*, max_length: int = CLIP_TOKENS, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's byte-level BPE: bytes, bytes that end a word, merges that make each of `TOKEN_WORDS` one token, two specials.

    `pad="!"` is the second tokenizer of SDXL and SD3: the token with id 0.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in TOKEN_WORDS:
        pieces = merge_pieces([*word[:-1], word[-1] + "</w>"], merges)
        for piece in pieces[1:]:
            merges.append((pieces[0], piece))
            pieces[0] += piece
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate((*tokens, "<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length, pad_token=pad)


def merge_pieces(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """What byte pair encoding makes of `pieces` with `merges`, the first of which go first."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        left, right = min(known, key=ranks.__getitem__)
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == (left, right):
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return pieces


def t5_tokenizer(*, max_length: int) -> T5Tokenizer:
    """T5's unigram pieces: `TOKEN_WORDS`, and the printable ASCII characters for whatever else is typed; ends with </s>."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -1.0) for word in TOKEN_WORDS] + [(chr(code), -6.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def clip(
    tokenizer: CLIPTokenizer, seed: int, *, width: int = 32, projected: bool = False, act: str = "quick_gelu"
) -> Any:
    """Two layers; `projected` is the class that SDXL and SD3 pool with, its projection as wide as its states."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return seed_weights((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)


def t5(tokenizer: T5Tokenizer, seed: int, *, width: int = 32) -> T5EncoderModel:
    """Two layers, gated GELU as in T5 1.1."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = seed_weights(T5EncoderModel(config), seed)
    for name, part in model.named_modules():
        if name.endswith("SelfAttention.q"):
            scale_layer(part, config.d_kv**-0.5)  # T5 has no other scale in its attention
    return model


def vae(seed: int, *, scaling: float, shift: float | None = None, quant: bool = True, **config: Any) -> AutoencoderKL:
    """Two levels, so 2 pixels a latent; 4 latent channels, of about unit variance once scaled; calm pictures around grey."""
    model = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        scaling_factor=scaling,
        shift_factor=shift,
        **config,
    )
    seed_weights(model, seed)
    scale_layer(model.decoder.conv_out, 0.3)
    set_posterior(model.encoder.conv_out, 4, 1 / scaling)
    if quant:
        set_identity(model.quant_conv)
    return model


def set_posterior(layer: Any, channels: int, spread: float) -> None:
    """Makes of an encoder's last layer one that gives means of about `spread`, and a standard deviation 0.05 of that."""
    with torch.no_grad():
        layer.weight[:channels] *= spread
        layer.bias[:channels] *= spread
        layer.weight[channels:] *= 0.1
        layer.bias[channels:] = 2 * float(np.log(0.05 * spread))


def set_identity(layer: Any) -> None:
    """Makes a convolution of one pixel give what it gets."""
    with torch.no_grad():
        layer.weight.copy_(torch.eye(len(layer.weight))[:, :, None, None])
        layer.bias.zero_()
