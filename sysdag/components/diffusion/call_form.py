"""How a pipeline of diffusers calls its denoiser at one step, as a form that can be filled with any sample and time.

    argument = pack(sample),  time argument = f(t),  model output = sign * unpack(answer)

`pack` and `unpack` are rearrangements (see `gathering`) and f is a fixed map (see `time_argument`); everything else
that reaches the denoiser is the conditioning, recorded once a prompt. `learning` finds them by watching the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sysdag.components.diffusion import rows
from sysdag.components.diffusion.gathering import Gather
from sysdag.components.diffusion.rows import How, Path
from sysdag.components.diffusion.time_argument import TimeArgument
from sysdag.errors import PlanError


@dataclass(frozen=True, eq=False)
class CallForm:
    """How one pipeline calls its denoiser for samples of one shape.

    Attributes:
        sample_shape: of one row's latents, as the scheduler steps them.
        latents_path, latents_shape, latents_dtype: of the argument that carries one row's latents.
        pack: from flat latents to that argument.
        times: the arguments that carry the time: the map from the scheduler's, and one row's shape.
        unpack: from the denoiser's flat answer to the model output of the same shape as the latents; the first half of
            what the scheduler gets where a model learns its variance too.
        arguments_grow, answer_grows: how both grow with the rows; None where the pipeline takes one prompt at a time.
        received_grow: how the pipeline's own arguments do: their time may be one number for all rows.
        structure: see `structure_of`.
        answer: one row's, all zeros.
    """

    sample_shape: tuple[int, ...]
    latents_path: Path
    latents_dtype: torch.dtype
    pack: Gather
    times: Mapping[Path, tuple[TimeArgument, tuple[int, ...]]]
    unpack: Gather
    arguments_grow: How | None
    received_grow: How | None
    answer_grows: How | None
    structure: tuple[Any, ...]
    answer: Any

    @property
    def takes_batches(self) -> bool:
        return self.arguments_grow is not None

    def arguments(self, recorded: Sequence[Mapping[str, Any]], noisy: Tensor, times: Tensor) -> dict[str, Any]:
        """The denoiser's arguments for a batch.

        Args:
            recorded: each row's arguments, as recorded.
            noisy: (n, *sample_shape).
            times: (n,) the scheduler's.
        """
        packed = self.pack(noisy.flatten(1).to(self.latents_dtype))
        made = []
        for row, arguments in enumerate(recorded):
            new: dict[Path, Any] = {self.latents_path: packed[row]}
            for path, (time, shape) in self.times.items():
                new[path] = time(times[row]).expand(shape)
            made.append(rows.replaced(arguments, new))
        return made[0] if len(made) == 1 else rows.joined(self.arguments_grow, made)  # type: ignore[arg-type]

    def model_output(self, answer: Any, count: int) -> Tensor:
        """(n, *sample_shape), what the pipeline would hand to its scheduler, in the answer's dtype.

        Raises:
            PlanError: for an answer of another size than the watched ones.
        """
        flat = flat_rows(self.answer_grows, answer, count)
        expected = sum(tensor.numel() for tensor in rows.tensors(self.answer))
        if flat.shape[1] != expected:
            raise PlanError(f"The denoiser answers with {flat.shape[1]} numbers a row; {expected} when it was watched.")
        return self.unpack(flat)

    def zero_answer(self, count: int) -> Any:
        """What the denoiser would give for `count` rows, all zeros."""
        return self.answer if count == 1 else rows.joined(self.answer_grows, [self.answer] * count)  # type: ignore[arg-type]


def flat_rows(how: How | None, answer: Any, count: int) -> Tensor:
    """(n, K), all numbers of a denoiser's answer, row by row."""
    parts = [answer] if count == 1 else rows.parted(how, answer, count)  # type: ignore[arg-type]
    return torch.stack([torch.cat([tensor.flatten() for tensor in rows.tensors(part)]) for part in parts])


def structure_of(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The nest of one row's arguments without their numbers: paths, and the dtypes and ranks of tensors."""
    return tuple(
        (path, str(leaf.dtype), leaf.ndim) if isinstance(leaf, Tensor) else (path, type(leaf).__name__, None)
        for path, leaf in rows.leaves(arguments)
    )
