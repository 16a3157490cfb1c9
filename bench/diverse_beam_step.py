"""One step of diverse beam search against transformers 4.56's group by group: `python -m bench diverse_beam_step`.

    python3 -m venv peer && peer/bin/pip install torch==2.13.0 transformers==4.56.2
    python -m bench diverse_beam_step [--peer-python peer/bin/python]

transformers 4.56 handles one group after the other: it gathers the group's logits, takes their log_softmax, applies
HammingDiversityLogitsProcessor and takes a top-k; the row `group by group` is that. With --peer-python it is run with
transformers' own processor, in a process of its own, in turns with ours; without, with the same written here in torch
(`peer` says which). What transformers does after the top-k with the chosen beams is not timed. Ratios are to this row;
`reference` is the op's own in plain torch, all prompts at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

if __package__:
    from bench import measure

PROMPTS, GROUPS, PENALTY = 8, 4, 1.0
SHAPES = [(1, 32000, "float32"), (2, 32000, "float32"), (1, 32000, "bfloat16"), (1, 151936, "float32")]  # K, V, dtype
BASELINE, PEERS = "group by group", ("reference",)
Processor = Callable[..., Tensor]
Shape = tuple[int, int, str, str]  # K, V, dtype, device


def problem(K: int, V: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(PROMPTS * GROUPS * K, V, generator=generator)).to(getattr(torch, dtype))
    return logits.to(device), -torch.rand(PROMPTS, GROUPS, K, generator=generator).to(device)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result; bench.measure's way, which the other process cannot import."""
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Hamming:
    """The penalty of transformers' HammingDiversityLogitsProcessor, for where that is not installed."""

    def __init__(self, diversity_penalty: float, num_beams: int, num_beam_groups: int) -> None:
        self.penalty, self.beams, self.size = diversity_penalty, num_beams, num_beams // num_beam_groups

    def __call__(self, input_ids: Any, scores: Tensor, current_tokens: Tensor, beam_group_idx: int) -> Tensor:
        if beam_group_idx == 0:
            return scores
        scores = scores.clone()
        for b in range(len(current_tokens) // self.beams):
            earlier = current_tokens[b * self.beams : b * self.beams + beam_group_idx * self.size]
            times = torch.bincount(earlier, minlength=scores.shape[-1])
            scores[b * self.size : (b + 1) * self.size] -= self.penalty * times
        return scores


def group_by_group(logits: Tensor, scores: Tensor, processor: Processor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (B*G*K, V): tokens, parents and scores (B, G, 2K)."""
    B, G, K = scores.shape
    V = logits.shape[-1]
    current = torch.zeros(B * G * K, dtype=torch.int64, device=logits.device)
    found = []
    for g in range(G):
        rows = [b * G * K + g * K + k for b in range(B) for k in range(K)]
        log_probs = torch.nn.functional.log_softmax(logits[rows].to(torch.float32), dim=-1)
        log_probs = processor(None, log_probs, current_tokens=current, beam_group_idx=g)
        total = (log_probs + scores[:, g].reshape(-1, 1)).view(B, K * V)
        best, flat = torch.topk(total, 2 * K, dim=1, largest=True, sorted=True)
        found.append((flat % V, torch.div(flat, V, rounding_mode="floor"), best))
        current[rows] = found[-1][0][:, :K].flatten()
    tokens, parents, best = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    return tokens, parents, best


def work() -> None:
    """Answers each line of threads, shape and device with the time of one call and its result, until the input ends."""
    import transformers

    problems: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    for line in sys.stdin:
        threads, *shape = json.loads(line)
        torch.set_num_threads(threads)
        if tuple(shape) not in problems:
            problems = {tuple(shape): problem(*shape)}
        logits, scores = problems[tuple(shape)]
        processor = transformers.HammingDiversityLogitsProcessor(PENALTY, GROUPS * scores.shape[-1], GROUPS)
        seconds, result = timed(partial(group_by_group, logits, scores, processor))
        print(json.dumps([seconds, [part.tolist() for part in result], transformers.__version__]), flush=True)


class Peer:
    """Times `group_by_group`, here or in another process."""

    def __init__(self, python: str | None) -> None:
        self.name = "torch"
        self.process = None
        if python is not None:
            command = [python, "-I", __file__]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, shape: Shape, inputs: tuple[Tensor, Tensor]) -> tuple[float, list[Tensor]]:
        if self.process is None:
            processor = Hamming(PENALTY, GROUPS * shape[0], GROUPS)
            return timed(partial(group_by_group, *inputs, processor))
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([torch.get_num_threads(), *shape]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended with {self.process.wait()}; its error is above.")
        seconds, parts, version = json.loads(line)
        self.name = f"transformers {version}"
        return seconds, [torch.tensor(part, device=shape[3]) for part in parts]


def measure_shape(peer: Peer, shape: Shape, repeats: int, peers: Sequence[str] | None) -> list[dict[str, Any]]:
    from sysdag.ops import diverse_beam_step, use_backend

    flat, scores = inputs = problem(*shape)
    logits = flat.view(*scores.shape, -1)

    def reference() -> tuple[Tensor, Tensor, Tensor]:
        with use_backend("reference"):
            return diverse_beam_step(logits, scores, PENALTY)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        return diverse_beam_step(logits, scores, PENALTY)

    _, theirs = peer.run(shape, inputs)
    for name, found in (("reference", reference()), ("sysdag", step())):
        same = all(torch.equal(a, b) for a, b in zip(found[:2], theirs[:2], strict=True))
        if not same or not torch.allclose(found[2], theirs[2], rtol=1e-6, atol=1e-5):
            raise SystemExit(f"{shape}: {name} chooses otherwise than its peer, so no time is reported.")

    functions = {BASELINE: lambda: peer.run(shape, inputs), "reference": lambda: timed(reference)}
    functions = measure.wanted(functions | {"sysdag": lambda: timed(step)}, peers, baseline=BASELINE)
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-2, repeats):
        for name in list(found)[:: -1 if turn % 2 else 1]:
            seconds, _ = functions[name]()
            if turn >= 0:
                found[name].append(seconds)
    times = {name: measure.Times(tuple(seconds)) for name, seconds in found.items()}
    K, V, dtype, _ = shape
    columns = {"prompts": PROMPTS, "groups": GROUPS, "beams": K, "V": V, "dtype": dtype, "peer": peer.name}
    return measure.rows(times, baseline=BASELINE, **columns)


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "diverse_beam_step", arguments, peers=PEERS, repeats=21)
    peer = Peer(options.peer_python)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        rows += measure_shape(peer, (*shape, options.device), options.repeats, options.peers)
    measure.report("diverse_beam_step", rows, options.csv)


if __name__ == "__main__":
    work()
