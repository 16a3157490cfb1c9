"""Random numbers that are functions of what they are for: of a row's seed, a position in it and a place there.

Nothing is carried from one draw to the next, so a draw does not depend on the rows beside it, their order or number,
nor on what was drawn before; and 64-bit integers are the same on every device. Each level is SplitMix64 (Steele, Lea
and Flood 2014, "Fast Splittable Pseudorandom Number Generators") with the output of the level above as its state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _output(state: Tensor, number: Tensor | int) -> Tensor:
    """The output of that number, from 0, of SplitMix64 from a state; integers overflow as they should."""
    x = state + (number + 1) * _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def uniforms(seeds: Int[Tensor, " B"], positions: Int[Tensor, " B"], count: int) -> Float[Tensor, "B {count}"]:
    """Independent numbers, uniform on multiples of 2^-53 plus half of that: within (0, 1), fp64.

    Args:
        seeds: of the rows, 64 bits each.
        positions: in each row.
    """
    state = _output(_output(seeds, 0), positions)[:, None]
    bits = _output(state, torch.arange(count, device=seeds.device))
    return (_shifted(bits, 11).double() + 0.5) * 2.0**-53


def seed_of(*parts: Any) -> int:
    """A seed of 62 bits that names what it is for: parts that read alike give the same one."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


RowGenerator = torch.Generator | Sequence[int] | None
"""What rows are drawn from: the seed of each; or a generator, torch's global one for None, that these come from."""


def row_seeds(generator: RowGenerator, count: int) -> list[int]:
    """A seed for each row: as given, or the next numbers of the generator, so that of a row has those before counted.

    Raises:
        ValueError: for seeds of another number of rows.
    """
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"generator: expected a seed for each of {count} rows, got {len(generator)}.")
        return [seed % 2**63 for seed in generator]
    place = "cpu" if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=place).tolist()
