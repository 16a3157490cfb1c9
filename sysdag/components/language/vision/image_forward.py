"""A vision-language model called with tokens that stand for images: its forward gets the pixels beside its own ids.

Decoding and packed scoring call a model with ids, a mask and positions. While `installed` lasts, a hook before the
model's forward

- puts back the placeholders' common id, and adds the pixels of each row's images, in the order of their placeholders;
- says of each token whether it is an image's, where the forward asks for that;
- makes positions of several axes (M-RoPE: Wang et al. 2024, "Qwen2-VL", arXiv 2409.12191) of plain ones, by the model's
  own function, path by path in packed rows;
- has a placeholder that a model wrote itself, which no image belongs to, read as any token: by its embedding.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components.language.language_head import argument_names, inner_model
from sysdag.components.language.model_cache import OF_KEYS
from sysdag.components.language.probe import probing
from sysdag.components.language.vision.image_parts import HeldImage
from sysdag.components.language.vision.prompt_images import FIRST, TOKEN_TYPES, ImageProcessing, PromptImages


class ImageForward:
    """The hook of one model.

    Args:
        model: of transformers, perhaps inside a PeftModel.
        processing: what its images are read by.
    """

    def __init__(self, model: nn.Module, processing: ImageProcessing) -> None:
        self.processing = processing
        self._accepts = argument_names(model)
        self._model = weakref.ref(model)  # which this is kept by
        self._has_axes = _rope_index(model) is not None
        self._written: Tensor | None = None  # placeholders that are tokens like others, of the call at hand

    def before(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments that the forward gets."""
        ids = given["input_ids"]
        placeholder = self.processing.image_token
        stands = ids >= FIRST
        written = ids == placeholder
        self._written = written if bool(written.any()) else None
        made = {**given, "input_ids": ids.masked_fill(stands, placeholder)}
        if self._written is not None:
            made["input_ids"] = made["input_ids"].masked_fill(written, 0 if placeholder else 1)
        cache = next((given[name] for name in OF_KEYS if name in given), None)
        starts = cache is None or cache.get_seq_length() == 0
        rows = self._images(ids) if bool(stands.any()) else []
        if not starts and rows and "token_type_ids" in self._accepts:
            raise RuntimeError("an image stands behind tokens in a cache, which this model's mask does not allow for")
        made |= {name: stands.long() for name in TOKEN_TYPES if name in self._accepts and starts}
        if rows:
            _, dtype = _place(module)
            for name, value in self.processing.together(rows).items():
                made[name] = value.to(ids.device, dtype if value.is_floating_point() else value.dtype)
            if self._has_axes and given.get("position_ids") is not None:
                made["position_ids"] = self._positions(ids, given["position_ids"])
        return args, made

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forgets the call."""
        self._written = None

    def embed(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The embeddings of tokens, with those of placeholders that the model wrote in their places."""
        written = self._written
        if written is None or output.shape[:-1] != written.shape:
            return output
        own = module.forward(torch.full((1,), self.processing.image_token, device=written.device))
        return torch.where(written[..., None].to(output.device), own[0].to(output), output)

    def offset(self, prompt: Sequence[int]) -> int:
        """What is added to the positions of the tokens behind a prompt."""
        if not self._has_axes or not any(token >= FIRST for token in prompt):
            return 0
        places = self._path_positions(torch.tensor(list(prompt)))
        return int(places.max()) + 1 - len(prompt)

    def _images(self, ids: Tensor) -> list[list[PromptImages]]:
        """The images of each row, in the order of their placeholders; those of one prompt may be there twice."""
        found = []
        for row in ids.tolist():
            tokens = [token for token in row if token >= FIRST]
            images = []
            while tokens:
                known = self.processing.known(tokens[0])
                mine, tokens = tokens[: known.count], tokens[known.count :]
                if mine != [known.token] * known.count:
                    raise RuntimeError("the images of a prompt are not whole in its row")
                images.append(known)
            found.append(images)
        return found

    def _positions(self, ids: Tensor, plain: Tensor) -> Tensor:
        """Positions (3, R, L) of tokens whose places in their own sequences are `plain` (R, L)."""
        found = plain.expand(3, *ids.shape).clone() if plain.shape != ids.shape else plain[None].repeat(3, 1, 1)
        places = plain.expand(ids.shape).tolist()
        for row, depths in enumerate(places):
            if not bool((ids[row] >= FIRST).any()):
                continue
            for path in _paths(depths):
                columns = torch.tensor(path, device=ids.device)
                if bool((ids[row, columns] >= FIRST).any()):
                    found[:, row, columns] = depths[path[0]] + self._path_positions(ids[row, columns])
        return found

    def _path_positions(self, ids: Tensor) -> Tensor:
        """Positions (3, L) of one sequence, from 0."""
        rope_index = _rope_index(self._model())
        assert rope_index is not None
        stands = ids >= FIRST
        grids = self.processing.together(self._images(ids[None]), ["image_grid_thw"]).get("image_grid_thw")
        given = {
            "input_ids": ids.masked_fill(stands, self.processing.image_token)[None],
            "mm_token_type_ids": stands[None].long(),
            "image_grid_thw": None if grids is None else grids.to(ids.device),
        }
        taken = inspect.signature(rope_index).parameters  # which differ by version
        positions, _ = rope_index(**{name: value for name, value in given.items() if name in taken})
        return positions[:, 0]


def complaint(model: nn.Module, forward: ImageForward) -> str:
    """What differs between a prompt with an image as transformers' processor has it and as it is called here.

    "" where nothing does, or where the weights are not finite. To be asked while nothing is `installed`.
    """
    from PIL import Image

    processor = forward.processing.processor
    image = HeldImage(Image.linear_gradient("L").resize((48, 32)).convert("RGB"))
    parts = [{"type": "image", "image": image.source}, {"type": "text", "text": "a"}]
    asked = [{"role": "user", "content": parts}]
    made = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids, _ = forward.processing.told_apart(made["input_ids"][0].tolist(), [image], text)
    device, dtype = _place(model)
    inputs = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in made.items()}

    def plain() -> Tensor:
        return model(**inputs, use_cache=False).logits[0]

    def here() -> Tensor:
        with installed(model, forward):
            return model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]

    with probing(model, plain, plain) as wanted:
        found = "" if wanted is None else wanted.complaint(here)
    return found


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where pixels go, and in which dtype."""
    weight = next(each for each in model.parameters() if each.is_floating_point())
    return weight.device, weight.dtype


def _paths(depths: Sequence[int]) -> Iterator[list[int]]:
    """The columns of each sequence in a row, by their depths in depth-first order, from what begins it to its end."""
    path: list[int] = []
    for column, depth in enumerate(depths):
        kept = [each for each in path if depths[each] < depth]
        if path and len(kept) < len(path):
            yield path
        path = [*kept, column] if kept and depths[kept[-1]] == depth - 1 else [column]
    if path:
        yield path


def _rope_index(model: Any) -> Callable[..., Any] | None:
    """What a model makes positions of several axes with; None for one that counts tokens."""
    return next((module.get_rope_index for module in model.modules() if hasattr(type(module), "get_rope_index")), None)


@contextlib.contextmanager
def installed(model: nn.Module, forward: ImageForward) -> Iterator[None]:
    """Has a model called with images while the context lasts."""
    embeddings = inner_model(model).get_input_embeddings()
    handles = [
        model.register_forward_pre_hook(forward.before, with_kwargs=True),
        model.register_forward_hook(forward.after),
        embeddings.register_forward_hook(forward.embed),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
