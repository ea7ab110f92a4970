"""The two text encoders and their tokenizers, trained with labels and then frozen.

Each T5 token of an object learns to say everything about that object, every token says the ground and the relation, and
CLIP's pooled token says the whole caption; so `flow` finds in each token what it needs. The labels' heads are dropped.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from . import stage
from .world import COLOURS, GROUNDS, PLACES, RELATIONS, SHAPES, SIZES, Caption, loosen_caption, sample_caption

STEPS = 1000
WIDTH = 128
CLIP_TOKENS = 32
T5_TOKENS = 16
BATCH = 96


def grammar_words() -> list[str]:
    """Every word of the grammar, sorted."""
    phrases = [*SHAPES, *SIZES, *COLOURS, *GROUNDS, *PLACES, *RELATIONS, "a an and shape on background"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE laid out as CLIP's: bytes, bytes that end a word, merges (each word is one token), two specials."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator([" ".join(grammar_words())] * 4, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """A unigram vocabulary of whole words, with single letters for whatever else is typed."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [("▁" + word, -1.0) for word in grammar_words()] + [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_TOKENS)


class Encoders(torch.nn.Module):
    """CLIP and T5 with their tokenizers: prompts -> (pooled [B, D], tokens [B, 16, D]), as FluxPipeline calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer(), t5_tokenizer()
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.clip_tokenizer),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CLIP_TOKENS,
                bos_token_id=self.clip_tokenizer.bos_token_id,
                eos_token_id=self.clip_tokenizer.eos_token_id,
                pad_token_id=self.clip_tokenizer.pad_token_id,
            )
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer),
                d_model=WIDTH,
                d_kv=32,
                d_ff=2 * WIDTH,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        )

    def tokenize(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, 16] and [B, 16]. CLIP's padding is cut: a causal model does not see it from the end token."""
        clip = self.clip_tokenizer(prompts, padding="max_length", max_length=T5_TOKENS, truncation=True)["input_ids"]
        t5 = self.t5_tokenizer(prompts, padding="max_length", max_length=T5_TOKENS, truncation=True)["input_ids"]
        return torch.tensor(clip), torch.tensor(t5)

    def forward(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        clip, t5 = self.tokenize(prompts)
        return self.clip(clip).pooler_output, self.t5(t5).last_hidden_state


def train_encoders(folder: Path) -> Encoders:
    """The trained encoders. Checkpoint: `text.pt`."""
    torch.manual_seed(stage.SEED)
    encoders = Encoders()
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(WIDTH, sum(sizes)) for name, sizes in HEADS.items()})
    both = torch.nn.ModuleDict({"encoders": encoders, "heads": heads})

    def step(i: int, rng: np.random.Generator) -> torch.Tensor:
        captions = [sample_caption(rng) for _ in range(BATCH)]
        captions = [Caption(), *(c if k % 2 else loosen_caption(c, rng) for k, c in enumerate(captions))]
        pooled, tokens = encoders([str(c) for c in captions])
        owner, thing, scene, whole = (torch.from_numpy(np.stack(x)) for x in zip(*map(_labels, captions), strict=True))
        owned = owner >= 0
        return (
            _loss("thing", heads["thing"](tokens[owned]), thing[owned])
            + _loss(
                "scene", heads["scene"](tokens).flatten(0, 1), scene[:, None].expand(-1, T5_TOKENS, -1).flatten(0, 1)
            )
            + _loss("whole", heads["whole"](pooled), whole)
        )

    adam = torch.optim.AdamW(both.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)
    stage.run_stage(folder / "text.pt", both, step, steps=STEPS, optimisers=[adam], hold=0.4)
    return encoders.eval().requires_grad_(False)


ROLES = 1 + len(PLACES) + 2 * (1 + len(RELATIONS))  # of one object: free, a place, first or second of a relation
SCENES = 1 + len(PLACES) + 1 + len(RELATIONS)
HEADS = {
    "thing": (len(SHAPES) + 1, len(SIZES) + 1, len(COLOURS) + 1, ROLES),
    "scene": (SCENES, len(GROUNDS) + 1),
    "whole": (*(n for x in (SHAPES, SIZES, COLOURS) for n in (len(x) + 2,) * 2), SCENES, len(GROUNDS) + 1),
}


def _loss(head: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the head's questions. logits: [N, sum of classes], labels: [N, questions]."""
    parts = logits.split(HEADS[head], -1)
    losses = (F.cross_entropy(part, labels[:, k]) for k, part in enumerate(parts))
    return sum(losses, logits.new_zeros(())) / len(parts)


def _labels(caption: Caption) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """owner [16] (-1: no object's token), its answers [16, 4], the scene's [2], the whole caption's [8]; 0 is "free"."""

    def code(name: str | None, names) -> int:
        return 0 if name is None else 1 + list(names).index(name)

    two = len(caption.things) == 2
    scene = 1 + len(PLACES) + code(caption.relation, RELATIONS) if two else code(caption.place, PLACES)
    ground = code(caption.ground, GROUNDS)
    owner, answers = np.full(T5_TOKENS, -1), np.zeros((T5_TOKENS, 4), np.int64)
    whole, at = [], 0
    for k in range(2):
        if k >= len(caption.things):
            whole.append((len(SHAPES) + 1, len(SIZES) + 1, len(COLOURS) + 1))
            continue
        thing = caption.things[k]
        codes = code(thing.shape, SHAPES), code(thing.size, SIZES), code(thing.colour, COLOURS)
        whole.append(codes)
        n = len(str(thing).split())
        role = 1 + len(PLACES) + k * (1 + len(RELATIONS)) + code(caption.relation, RELATIONS) if two else scene
        owner[at : at + n], answers[at : at + n] = k, (*codes, role)
        at += n + len((caption.relation or "and").split())
    pairs = [w for pair in zip(*whole, strict=True) for w in pair]
    return owner, answers, np.array([scene, ground]), np.array([*pairs, scene, ground])
