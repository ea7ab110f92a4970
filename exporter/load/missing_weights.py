"""Missing weights: what a model's files do not hold, and its library made up. diffusers leaves such a tensor without numbers,
or fills it at random; transformers fills it at random. Both say so in their log alone, and go on.

Both also say it to who asks `from_pretrained` for its loading info. A pipeline loads its components itself, so they are
asked here, while it does. Of a single file diffusers says nothing: it fails where it moves the tensor without numbers.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ...runtime.errors import ExportError

SHOWN_NAMES = 4
_patch_lock = threading.RLock()  # who restores a method must be who replaced it last
MissingNames = dict[int, tuple[nn.Module, tuple[str, ...]]]
"""`id` of a model -> the model, and the names of its weights that were in no file."""


@contextlib.contextmanager
def record_missing_weights() -> Iterator[MissingNames]:
    """Inside, every model that diffusers' or transformers' `from_pretrained` makes is in the record."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    record: MissingNames = {}
    with _patch_lock:
        plain: dict[Any, Any] = {kind: vars(kind)["from_pretrained"] for kind in (ModelMixin, PreTrainedModel)}
        for kind, method in plain.items():
            kind.from_pretrained = classmethod(recording_loader(method.__func__, record))
        try:
            yield record
        finally:
            for kind, method in plain.items():
                kind.from_pretrained = method


def recording_loader(load: Any, record: MissingNames) -> Any:
    """`load`, a `from_pretrained`, which puts what it lacked into the record."""

    @functools.wraps(load)
    def from_pretrained(kind: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = load(kind, *args, output_loading_info=True, **kwargs)
        record[id(model)] = (model, tuple(sorted(info.get("missing_keys", ()))))
        return (model, info) if output_loading_info else model

    return from_pretrained


def refuse_missing_weights(model: str, components: Mapping[str, Any], record: MissingNames) -> None:
    """Raises ExportError with every component that lacks weights: by the record, or because they have no numbers."""
    refuse_lacking(
        model,
        {
            name: {*record.get(id(part), (part, ()))[1], *empty_tensors(part)}
            for name, part in components.items()
            if isinstance(part, nn.Module)
        },
    )


def refuse_empty_tensors(model: str, pipeline: type, error: BaseException) -> None:
    """Raises ExportError if the error is torch's about weights without numbers; it names those of the pipeline's model."""
    if not isinstance(error, NotImplementedError):
        return
    names = {hint: name for name, hint in pipeline.__init__.__annotations__.items()}
    for frame, _ in traceback.walk_tb(error.__traceback__):  # the outermost model is the component
        for part in frame.f_locals.values():
            if isinstance(part, nn.Module):
                refuse_lacking(model, {names.get(type(part), type(part).__name__): {*empty_tensors(part)}})


def refuse_lacking(model: str, lacking: Mapping[str, Collection[str]]) -> None:
    """Raises ExportError unless no component lacks a weight."""
    told = "; ".join(f"{name} lacks {list_names(sorted(weights))}" for name, weights in lacking.items() if weights)
    if told:
        raise ExportError(f"model {model!r}: {told}; download or save the whole model again")


def empty_tensors(part: nn.Module) -> Iterable[str]:
    """The names of parameters and buffers that have a shape and no numbers."""
    yield from (name for name, tensor in part.named_parameters() if tensor.is_meta)
    yield from (name for name, tensor in part.named_buffers() if tensor.is_meta)


def list_names(names: Collection[str]) -> str:
    """The first few, and how many there are in all."""
    few = ", ".join([*names][:SHOWN_NAMES])
    return few if len(names) <= SHOWN_NAMES else f"{few} and {len(names) - SHOWN_NAMES} more"
