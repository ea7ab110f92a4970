"""Tokenizers that do not belong to their text encoders, at export; and where a graph looks ids up."""

import pytest
import torch
from torch import nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.families.text import prompt_entry, refuse_ids_without_rows
from prebake.exporter.passes.captured_graph import find_embeddings
from prebake.runtime import ExportError


class Looking(nn.Module):
    """Two tables by ids that are given, one by positions, and one whose ids are computed."""

    def __init__(self):
        super().__init__()
        self.words, self.more, self.positions = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Embedding(3, 4)
        self.register_buffer("ids", torch.arange(3).unsqueeze(0))

    def forward(self, input_ids, input_ids_2):
        seen = self.words(input_ids.view(-1, 3).to(torch.int64)) + self.positions(self.ids)
        return (seen + self.more(input_ids_2) + self.more(input_ids + input_ids_2),)


def test_ids_are_followed_to_the_table_that_they_are_looked_up_in():
    ids = torch.zeros(1, 3, dtype=torch.int64)
    graph = capture_graph("text", Looking(), (ids, ids.clone()), ("input_ids", "input_ids_2"), ("x",))
    assert find_embeddings(graph) == {"input_ids": "words.weight", "input_ids_2": "more.weight"}


def entries(pipe):
    return [prompt_entry("tokenizer", pipe.tokenizer, 16), prompt_entry("tokenizer_2", pipe.tokenizer_2, 8)]


def test_a_token_that_was_added_without_a_row_is_refused_before_anything_is_captured(tiny_pipe):
    refuse_ids_without_rows(tiny_pipe, entries(tiny_pipe))
    rows = len(tiny_pipe.text_encoder.get_input_embeddings().weight)
    names = [f"<new{i}>" for i in range(rows - len(tiny_pipe.tokenizer) + 1)]
    tiny_pipe.tokenizer.add_tokens(names)
    with pytest.raises(
        ExportError, match=rf"tokenizer: the token '{names[-1]}' has the id {rows}, the embedding of its"
    ):
        refuse_ids_without_rows(tiny_pipe, entries(tiny_pipe))
    tiny_pipe.text_encoder.resize_token_embeddings(rows + 1)
    refuse_ids_without_rows(tiny_pipe, entries(tiny_pipe))


def test_every_tokenizer_is_looked_at(tiny_pipe):
    rows = len(tiny_pipe.text_encoder_2.get_input_embeddings().weight)
    tiny_pipe.tokenizer_2.add_tokens([f"<new{i}>" for i in range(rows - len(tiny_pipe.tokenizer_2) + 1)])
    with pytest.raises(ExportError, match="tokenizer_2: the token "):
        refuse_ids_without_rows(tiny_pipe, entries(tiny_pipe))


def test_the_export_asks(tiny_folder, monkeypatch):
    from prebake.exporter import whole_pipeline
    from prebake.exporter.recipe.resolve import resolve
    from support.captured_pipeline import prepared

    def refuse(pipe, prompts):
        raise ExportError(f"asked of {len(prompts)}")

    monkeypatch.setattr(whole_pipeline, "refuse_ids_without_rows", refuse)
    with pytest.raises(ExportError, match="asked of 2"):
        prepared(resolve("flux-fast", ("sampler.steps=2",), str(tiny_folder)))
