"""A text-to-image pipeline of diffusers as what it does by itself: its own sampling, and its own calls of its denoiser.

Sampling is the pipeline's call. A score fills the recorded call of the denoiser for a prompt with another sample and
time (see `call_form`); the conditioning is recorded once a prompt and size, and kept.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components.diffusion import prompt_limits, rows, watching
from sysdag.components.diffusion.call_form import CallForm, structure_of
from sysdag.components.diffusion.decoding_form import DecodingForm, learn_decoding
from sysdag.components.diffusion.guidance_off import unguided
from sysdag.components.diffusion.kept_texts import version_of
from sysdag.components.diffusion.learning import learn_calls
from sysdag.components.diffusion.pipeline_sampling import Drawn, draw_rows
from sysdag.components.diffusion.prompt_limits import PromptLimit
from sysdag.components.diffusion.prompts_together import keeps_apart
from sysdag.components.diffusion.watched_steps import Misfit, run_quietly
from sysdag.components.footprint import bytes_of
from sysdag.errors import PlanError

logger = logging.getLogger(__name__)

ANY_PROMPT = "a photo"
"""For what does not depend on the prompt."""

Size = tuple[int, ...]
"""(height, width) of an image, (frames, height, width) of a film; () for what the pipeline draws by itself."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """One prompt's call of the denoiser.

    Attributes:
        form: what fills it.
        arguments: for one row, as they were recorded.
        company: equal for those that one batch may hold.
    """

    form: CallForm
    arguments: Mapping[str, Any]
    company: Any


@dataclass(eq=False)
class PipelineCalls:
    """The calls of one pipeline.

    Attributes:
        pipe: gives the pipeline as its parts are now.
        arguments: of its call, beside prompt, size, generator and number of steps.
        num_inference_steps: of sampling; None: the pipeline's own.
        trains_text: whether gradients reach its text encoders, so that nothing of a prompt can be kept.
        budget: most bytes of recorded conditioning that are kept, on the CPU; 0: nothing is.
        score_guidance: the guidance that the denoiser reads as one of its arguments when it is scored; None: that of
            sampling.
    """

    pipe: Callable[[], Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    num_inference_steps: int | None = None
    trains_text: bool = False
    budget: int = 2**30
    score_guidance: float | None = None
    _forms: dict[Any, list[CallForm]] = field(default_factory=dict)
    _decoding: dict[Size, DecodingForm] = field(default_factory=dict)
    _kept: OrderedDict[Any, Recorded] = field(default_factory=OrderedDict)
    _kept_bytes: int = 0
    _off: dict[str, Any] | None = None
    _default_size: Size | None = None
    _together: dict[int, bool] = field(default_factory=dict)
    _limits: list[PromptLimit] = field(default_factory=list)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int) -> list[Drawn]:
        """One draw a prompt, by the pipeline's own call; prompts are called together where their conditioning is as
        long, so that none is padded for another's sake.

        Raises:
            PlanError: for numbers that are not finite, naming the denoiser, scheduler or decoder they come from.
        """
        size: Size = ()
        recorded = [self.recorded(prompt, size) for prompt in prompts]
        drawn: dict[int, Drawn] = {}
        for group in _companies(recorded):
            most = batch_size if self._samples_together([prompts[row] for row in group], recorded[group[0]].form) else 1
            for start in range(0, len(group), most):
                block = group[start : start + most]
                made = self._drawn([prompts[row] for row in block], [seeds[row] for row in block])
                drawn |= dict(zip(block, made, strict=True))
        return [drawn[row] for row in range(len(prompts))]

    def _drawn(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Drawn]:
        place = self.decoding(prompts[0], ()).place
        return draw_rows(self.pipe(), prompts, seeds, {**self.arguments, **self._steps()}, place)

    def _samples_together(self, prompts: Sequence[str], form: CallForm) -> bool:
        """Whether a call with several prompts does to each what a call with it alone does.

        Seen once, at the first step with the first two prompts: the rows that reach the denoiser are the same ones.
        """
        others = [prompt for prompt in prompts if prompt != prompts[0]]
        if not form.takes_batches or not others:
            return form.takes_batches
        if id(form) not in self._together:
            pair, arguments = (prompts[0], others[0]), {**self.arguments, **self._steps()}
            agrees = self._together[id(form)] = keeps_apart(self.pipe, pair, arguments, form)
            if not agrees:
                kind = type(self.pipe()).__name__
                logger.warning("%s does not keep the prompts of one call apart: it is called with one at a time.", kind)
        return self._together[id(form)]

    def default_size(self, prompt: str) -> Size:
        """Of what the pipeline draws where its call is not told a size."""
        if self._default_size is None:
            form = self.recorded(prompt, ()).form

            def on_denoiser(given: dict[str, Any], answer: Any) -> Any:
                return form.zero_answer(1)

            arguments = {**self._call(prompt, ()), **self._steps()}
            output = run_quietly(self.pipe(), [prompt], arguments, on_denoiser=on_denoiser)
            self._default_size = size_of(output[0][0])
        return self._default_size

    def decoding(self, prompt: str, size: Size) -> DecodingForm:
        """How latents of a size are decoded.

        Raises:
            PlanError: if that cannot be told.
        """
        if size not in self._decoding:
            pipe, arguments = self.pipe(), self._call(prompt, size)
            try:
                form = self.recorded(prompt, size).form
                self._decoding[size] = learn_decoding(pipe, prompt, arguments, form)
            except Misfit as misfit:
                raise PlanError(f"{type(pipe).__name__} cannot be scored: {misfit}.") from None
        return self._decoding[size]

    def _call(self, prompt: str, size: Size) -> dict[str, Any]:
        """The arguments of the pipeline's call for a size, without guidance."""
        if self._off is None:
            self._off = unguided(self.pipe(), prompt, self.arguments)
            if self.score_guidance is not None:
                self._off = self._told(prompt, self._off, self.score_guidance)
        return {**self._off, **self._sizes(size)}

    def _told(self, prompt: str, off: Mapping[str, Any], guidance: float) -> dict[str, Any]:
        """The same with another guidance, of a denoiser that reads it.

        Raises:
            PlanError: if its arguments do not depend on it.
        """
        told = {**off, "guidance_scale": guidance}
        other = {**off, "guidance_scale": guidance + 1}
        pipe = self.pipe()
        if "guidance_scale" in watching.parameters_of_call(pipe):
            one, two = (rows.tensors(self._first_call(prompt, {**a, **self._steps()})) for a in (told, other))
            alike = len(one) == len(two) and all(a.shape == b.shape for a, b in zip(one, two, strict=True))
            if alike and not all(map(torch.equal, one, two)):
                return told
        raise PlanError(
            f"score_guidance_scale={guidance:g}: the denoiser of {type(pipe).__name__} reads no guidance as an "
            "argument, so that there is none in its scores. Leave it out; guidance_scale is that of sampling."
        )

    def _first_call(self, prompt: str, arguments: Mapping[str, Any], *, gradients: bool = False) -> Mapping[str, Any]:
        """The arguments that reach the denoiser first."""
        found: list[Mapping[str, Any]] = []

        def on_denoiser(given: dict[str, Any], answer: Any) -> Any:
            found.append(given)
            raise watching.Stop

        run_quietly(self.pipe(), [prompt], arguments, on_denoiser=on_denoiser, gradients=gradients)
        return found[0]

    def _sizes(self, size: Size) -> dict[str, int]:
        taken = watching.parameters_of_call(self.pipe())
        names = ("num_frames", "height", "width")[3 - len(size) :]
        return {name: number for name, number in zip(names, size, strict=True) if name in taken}

    def recorded(self, prompt: str, size: Size, *, gradients: bool = False) -> Recorded:
        """The denoiser's call for a prompt; from what is kept where text encoders do not train.

        Raises:
            DataError: if the pipeline does not take the prompt.
        """
        pipe = self.pipe()
        key = (prompt, size, _where(pipe), _encoders(pipe))
        if key in self._kept and not self.trains_text:
            self._kept.move_to_end(key)
            return self._kept[key]
        arguments = self._call(prompt, size)
        with prompt_limits.watched(pipe, prompt) as seen:
            given = self._first_call(prompt, {**arguments, **self._steps()}, gradients=gradients and self.trains_text)
        self._limits = seen or self._limits  # an empty prompt is cut by none
        if lost := prompt_limits.tokens_lost(seen, prompt):
            logger.warning("%s cuts the last %d tokens of a prompt: %.80r", type(pipe).__name__, lost, prompt)
        form = self._form(pipe, prompt, size, arguments, structure_of(given))
        kept = rows.replaced(given, {form.latents_path: None})
        if not self.trains_text:
            kept = rows.mapped_tensors(kept, lambda tensor: tensor.detach().cpu())
        company = None if form.arguments_grow is None else rows.company(form.arguments_grow, given)
        made = Recorded(form, kept, (id(form), company))
        if not self.trains_text:
            self._keep(key, made)
        return made

    def limits(self) -> list[PromptLimit]:
        """Where its tokenizers cut a prompt."""
        if not self._limits:
            self.recorded(ANY_PROMPT, ())
        return self._limits

    def _steps(self) -> dict[str, int]:
        return {} if self.num_inference_steps is None else {"num_inference_steps": self.num_inference_steps}

    def _form(self, pipe: Any, prompt: str, size: Size, arguments: Mapping[str, Any], structure: Any) -> CallForm:
        forms = self._forms.setdefault((size, _where(pipe)), [])
        for form in forms:
            if form.structure == structure:
                return form
        forms.append(learn_calls(pipe, prompt, arguments))
        if forms[-1].structure != structure:
            raise PlanError(f"{type(pipe).__name__} cannot be scored: its calls differ for one prompt.")
        return forms[-1]

    def _keep(self, key: Any, made: Recorded) -> None:
        if not self.budget:
            return
        self._kept[key] = made
        self._kept_bytes += sum(map(bytes_of, rows.tensors(made.arguments)))
        while self._kept_bytes > self.budget and len(self._kept) > 1:
            oldest = self._kept.popitem(last=False)[1]
            self._kept_bytes -= sum(map(bytes_of, rows.tensors(oldest.arguments)))

    def model_outputs(
        self, denoiser: Any, recorded: Sequence[Recorded], noisy: Sequence[Tensor], times: Tensor
    ) -> list[Tensor]:
        """What the pipeline would hand to its scheduler, one fp32 tensor a row.

        Args:
            denoiser: the model that is called.
            noisy: each row's sample.
            times: (n,) the scheduler's.
        """
        found: dict[int, Tensor] = {}
        for group in _companies(recorded):
            size = len(group) if recorded[group[0]].form.takes_batches else 1
            for start in range(0, len(group), size):
                block = group[start : start + size]
                form, device = recorded[block[0]].form, noisy[0].device
                placed = {id(recorded[row]): rows.mapped_tensors(recorded[row].arguments, _to(device)) for row in block}
                arguments = form.arguments(
                    [placed[id(recorded[row])] for row in block],
                    torch.stack([noisy[row] for row in block]),
                    times[block].to(device),
                )
                with _as_sampling(denoiser):
                    answer = denoiser(**arguments)
                output = form.model_output(answer, len(block)).float()
                found |= dict(zip(block, output, strict=True))
        return [found[row] for row in range(len(recorded))]


def _where(pipe: Any) -> Any:
    weight = next(getattr(pipe, watching.denoiser_name(pipe)).parameters())
    return weight.device, weight.dtype


def _encoders(pipe: Any) -> Any:
    """Changes where a text encoder or its weights do."""
    parts = pipe.components.items()
    encoders = [part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)]
    return tuple((id(encoder), version_of(encoder)) for encoder in encoders)


def size_of(value: Any) -> Size:
    """The size of a drawn image or film."""
    frames = list(value) if isinstance(value, (list, tuple)) else [value]
    width, height = frames[0].size
    return (len(frames), height, width) if isinstance(value, (list, tuple)) else (height, width)


def _companies(recorded: Sequence[Recorded]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for row, each in enumerate(recorded):
        groups.setdefault(each.company, []).append(row)
    return list(groups.values())


@contextlib.contextmanager
def _as_sampling(denoiser: nn.Module) -> Iterator[None]:
    """The model itself, though not its layers, in eval mode: HiDream's answers in another form where it trains."""
    training, denoiser.training = denoiser.training, False
    try:
        yield
    finally:
        denoiser.training = training


def _to(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device)
