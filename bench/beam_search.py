"""Diverse beam search against group beam search of transformers 4.56, on the CPU.

    python3 -m venv peer && peer/bin/pip install torch==2.13.0 transformers==4.56.2
    python -m bench beam_search --peer-python peer/bin/python [--csv]

Both run the same Qwen2 model (4 layers, width 256, vocabulary 8000, random weights), prompts and options, each in a
process of its own, in turns. No speed is reported where their sequences differ. A row of the table is one number of
threads (1 and all, unless --threads says it), tokens of the longest prompt, beams k and groups; the ratio is the peer's
median time over ours, by the clock and by the processor time of the process (steadier where the machine has other
work).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if __package__:
    from bench import measure
    from bench.json_process import JsonProcess

CONFIG = {
    "vocab_size": 8000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
PROMPTS, NEW_TOKENS = 8, 64
OPTIONS = {
    "diversity_penalty": 1.0, "max_new_tokens": NEW_TOKENS, "eos_token_id": 2, "pad_token_id": 0, "early_stopping": True
}  # fmt: skip
PROMPT_LENGTHS = (32, 128)
SHAPES = [(4, 4), (4, 2), (8, 8), (8, 4)]  # num_beams, num_beam_groups


def write_weights(path: Path) -> None:
    """Random weights; the head is large enough that the distributions are peaked, so rounding decides nothing."""
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    weights = Qwen2ForCausalLM(Qwen2Config(**CONFIG)).state_dict()
    weights["lm_head.weight"] *= 10
    save_file(weights, path)


def prompts(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and attention mask: each prompt is two tokens shorter than the one before, the first has `length`."""
    ids = torch.randint(3, CONFIG["vocab_size"], (PROMPTS, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) >= 2 * torch.arange(PROMPTS)[:, None]).long()
    return ids * mask, mask


def work(search: str, weights: Path) -> None:
    """Answers each line of options with a line of times and sequences, until the input ends."""
    import transformers
    from safetensors.torch import load_file

    transformers.logging.set_verbosity_error()
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**CONFIG)).eval()
    model.load_state_dict(load_file(weights))
    for line in sys.stdin:
        options: dict[str, Any] = {**OPTIONS, **json.loads(line)}
        torch.set_num_threads(options.pop("threads"))
        ids, mask = prompts(options.pop("prompt_tokens"))
        start, cpu_start = time.perf_counter(), time.process_time()
        if search == "sysdag":
            from sysdag.components.language.beam import diverse_beam_search

            sequences, _ = diverse_beam_search(model, ids, mask, **options)
        else:
            k = options["num_beams"]
            output = model.generate(ids, attention_mask=mask, num_return_sequences=k, do_sample=False, **options)
            sequences = output[:, ids.shape[1] :].view(PROMPTS, k, -1)
        times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({"sequences": sequences.tolist(), **times, **versions}), flush=True)


def compare(ours: JsonProcess, peer: JsonProcess, repeats: int, **options: int) -> dict[str, Any]:
    """Times of both for one set of options, once their sequences are found to be the same."""
    first, second = ours.run(**options), peer.run(**options)  # these warm up, too
    if first["sequences"] != second["sequences"]:
        raise SystemExit(f"{options}: the sequences differ, so no time is reported.")
    runs: dict[str, list[dict[str, Any]]] = {"sysdag": [], "peer": []}
    for turn in range(repeats):
        for name in sorted(runs, reverse=bool(turn % 2)):
            runs[name].append((ours if name == "sysdag" else peer).run(**options))
    row = {"prompts": PROMPTS, "new_tokens": len(first["sequences"][0][0]), **options, "repeats": repeats}
    for kind in ("seconds", "cpu_seconds"):
        for name, answers in runs.items():
            times = [answer[kind] for answer in answers]
            row |= {f"{name}_{kind}": statistics.median(times), f"{name}_{kind}_min": min(times)}
            row |= {f"{name}_{kind}_max": max(times)}
    row["ratio"] = row["peer_seconds"] / row["sysdag_seconds"]
    row["cpu_ratio"] = row["peer_cpu_seconds"] / row["sysdag_cpu_seconds"]
    for name, answer in {"sysdag": first, "peer": second}.items():
        row |= {f"{name}_torch": answer["torch"], f"{name}_transformers": answer["transformers"]}
    return row | {"python": platform.python_version(), "cpu": measure.cpu_name(), "cores": os.cpu_count()}


def measure_all(peer_python: str, repeats: int, threads: list[int]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.safetensors"
        write_weights(weights)
        ours = JsonProcess([sys.executable, "-m", "bench.beam_search", "sysdag", str(weights)])
        peer = JsonProcess([peer_python, "-I", __file__, "generate", str(weights)])
        rows = [
            compare(ours, peer, repeats, threads=count, prompt_tokens=length, num_beams=k, num_beam_groups=groups)
            for count in threads
            for length in PROMPT_LENGTHS
            for k, groups in SHAPES
        ]
        ours.stop()
        peer.stop()
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    peer_name = f"transformers {first['peer_transformers']}"
    lines = [
        f"{first['prompts']} prompts, {first['new_tokens']} new tokens; {first['cpu']}, {first['cores']} cores; "
        f"medians of {first['repeats']} interleaved runs",
        f"threads prompt   k groups    sysdag {peer_name:>20}  ratio  cpu ratio",
    ]
    for row in rows:
        options = f"{row['threads']:>7} {row['prompt_tokens']:>6} {row['num_beams']:>3} {row['num_beam_groups']:>6}"
        ours, peer = f"{row['sysdag_seconds']:.3f} s", f"{row['peer_seconds']:.3f} s"
        lines.append(f"{options} {ours:>9} {peer:>20} {row['ratio']:>6.2f} {row['cpu_ratio']:>10.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "beam_search", arguments, devices=["cpu"], repeats=5)
    if not options.peer_python:
        raise SystemExit(
            "beam_search needs --peer-python: see the top of bench/beam_search.py for how to make its environment."
        )
    threads = [options.threads] if options.threads else sorted({1, os.cpu_count() or 1})
    rows = measure_all(options.peer_python, options.repeats, threads)
    print(show(rows))
    if options.csv:
        measure.write(rows, options.csv)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
