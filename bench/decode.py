"""Sampling and diverse beam search with a language model, against transformers and a former build, on the CPU.

    python -m bench decode --model FOLDER [--prompts FILE.jsonl] [--former COMMIT] [--csv]

FOLDER holds a chat model, such as SmolLM2-135M-Instruct; beside it runs a random model of 24 layers, each of whose
tokens ends a text with a probability of about 1/48 (`--models random` runs that alone). Each way runs in a process of
its own, in turns, with the same prompts and options: whole distributions, and answers as long as they come out, up to
--max-new-tokens. The ways:

- sysdag: `CausalLM.sample` and `.search` of this tree;
- former: the same calls with the package as it was at --former, before rows could leave and enter, taken from git;
- generate: transformers' `generate`, all prompts padded to one batch;
- generate_batch: transformers' continuous batching.

Rates are new tokens over seconds, by the clock and by the processor time of the process (steadier where the machine has
other work); peak memory is what a call needs beyond what was there before it. A search has no tokens of its own to
count, so the time for all prompts is compared.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if __package__:
    from bench import measure
    from bench.instructions import INSTRUCTIONS
    from bench.json_process import JsonProcess

FORMER = "5cd0968"  # the last build whose rows stay to the end of their batch
CASES = {  # prompts, samples of each, what is done
    "64 prompts": (64, 1, "sample"),
    "16 prompts, 8 samples each": (16, 8, "sample"),
    "search, k = 4": (64, 4, "search"),
}
WAYS = {
    "64 prompts": ("sysdag", "former", "generate", "generate_batch"),
    "16 prompts, 8 samples each": ("sysdag", "generate", "generate_batch"),
    "search, k = 4": ("sysdag", "former"),
}
PEERS = ("former", "generate_batch")
RANDOM = "random, 24 layers"
WORDS, ENDS = 8000, 48


def random_model() -> tuple[Any, Any]:
    """A model of 24 layers with a word-level tokenizer, of whose tokens one in `ENDS` ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=512, intermediate_size=1408, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.update(eos_token_id=list(range(1, WORDS, ENDS)), pad_token_id=0, bos_token_id=None)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def loaded(folder: str) -> tuple[Any, Any]:
    import transformers

    if folder == RANDOM:
        return random_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def random_prompts(count: int) -> list[str]:
    """Words that begin alike, as a system prompt does, and go on for 4 to 100 words."""
    numbers = torch.Generator().manual_seed(1)

    def words(length: int) -> list[str]:
        return [f"w{number}" for number in torch.randint(2, WORDS, (length,), generator=numbers).tolist()]

    common = words(24)
    lengths = (4 + 96 * torch.rand(count, generator=numbers) ** 2).int().tolist()
    return [" ".join(common + words(length)) for length in lengths]


def ways_of(model: Any, tokenizer: Any, max_new_tokens: int) -> dict[str, Callable[..., Any]]:
    """Each returns the lengths of what it drew, or what it found; of prompts, samples of each, and a seed."""
    from sysdag.components import CausalLM

    lm = CausalLM(model, tokenizer, max_new_tokens=max_new_tokens)
    ends = set(lm.lm.eos_token_ids)

    def chat(prompts: Sequence[str]) -> list[Any]:
        return [[{"role": "user", "content": each}] for each in prompts] if tokenizer.chat_template else list(prompts)

    def sample(prompts: Sequence[str], samples: int, seed: int) -> list[int]:
        asked = [prompt for prompt in chat(prompts) for _ in range(samples)]
        draws = lm.sample(asked, generator=torch.Generator().manual_seed(seed))
        return [len(draw.record["token_ids"]) for draw in draws]

    def search(prompts: Sequence[str], samples: int, seed: int) -> list[Any]:
        found = lm.search(chat(prompts), samples, 1.0, 2)
        return [[draw.record["token_ids"] for draw in draws] for draws in found]

    def config(**options: Any) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends), pad_token_id=lm.lm.pad_token_id, **options,
        )  # fmt: skip

    def generate(prompts: Sequence[str], samples: int, seed: int) -> list[int]:
        ids = lm.prompt_ids(chat(prompts))
        width = max(map(len, ids))
        padded = torch.tensor([[lm.lm.pad_token_id] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        torch.manual_seed(seed)
        options = config(num_return_sequences=samples)
        rows = model.generate(padded, attention_mask=mask, generation_config=options)[:, width:].tolist()
        return [next((n + 1 for n, token in enumerate(row) if token in ends), len(row)) for row in rows]

    def generate_batch(prompts: Sequence[str], samples: int, seed: int) -> list[int]:
        ids = [row for row in lm.prompt_ids(chat(prompts)) for _ in range(samples)]
        torch.manual_seed(seed)
        with contextlib.redirect_stdout(sys.stderr):
            found = model.generate_batch(inputs=ids, generation_config=config(), progress_bar=False)
        if len(found) != len(ids):
            raise RuntimeError(f"{len(found)} of {len(ids)} came back")
        return [len(each.generated_tokens) for each in found.values()]

    return {"sample": sample, "search": search, "generate": generate, "generate_batch": generate_batch}


def work(folder: str, max_new_tokens: str) -> None:
    """Answers each line of a request with a line of figures, until the input ends."""
    import transformers

    transformers.logging.set_verbosity_error()
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.path[0] = str(ROOT)  # of this file's own helpers; sysdag comes from PYTHONPATH, which stands behind
    sys.path.insert(0, os.environ["SYSDAG_ROOT"])
    from bench.measure import PeakMemory

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ways = ways_of(*loaded(folder), int(max_new_tokens))
    for line in sys.stdin:
        asked = json.loads(line)
        way = asked["way"]
        try:
            with PeakMemory("cpu") as memory:
                start, cpu_start = time.perf_counter(), time.process_time()
                found = ways[way](asked["prompts"], asked["samples"], asked["seed"])
                taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
            answer = {"found": found, **taken, "peak_mib": memory.mib}
        except Exception as error:  # noqa: BLE001 (a peer that cannot run here)
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        print(json.dumps(answer), file=answers, flush=True)


def process_of(root: Path, folder: str, threads: int, max_new_tokens: int) -> JsonProcess:
    """One that holds a model and runs its ways, by the package below `root`."""
    own = {"SYSDAG_ROOT": str(root), "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
    return JsonProcess([sys.executable, str(Path(__file__)), folder, str(max_new_tokens)], os.environ | own)


def former_tree(commit: str, folder: Path) -> Path:
    """The package as it was at a commit, with this tree's compiled kernels."""
    made = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "sysdag", "kernels"], stdout=subprocess.PIPE)
    if made.returncode:
        raise SystemExit(f"decode: commit {commit} is not in this checkout's history; name another by --former.")
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        archive.extractall(folder, filter="data")
    for compiled in (ROOT / "sysdag").glob("_C*.so"):
        (folder / "sysdag" / compiled.name).symlink_to(compiled)
    return folder


def compare(
    case: str, model: str, prompts: Sequence[str], workers: Mapping[str, JsonProcess], repeats: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each way, and why a way is left out."""
    count, samples, what = CASES[case]
    answers: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS[case] if way in workers}
    request = {"prompts": list(prompts[:count]), "samples": samples}
    left_out = []
    for turn in range(repeats):
        for way in list(answers):
            asked = what if way in ("sysdag", "former") else way
            if not turn:
                workers[way].run(way=asked, prompts=request["prompts"][:2], samples=samples, seed=0)
            answer = workers[way].run(way=asked, seed=turn + 1, **request)
            if "error" in answer:
                left_out.append(f"left out: {case}, {way}: {answer['error']}")
                del answers[way]
            else:
                answers[way].append(answer)
    if what == "search" and "former" in answers:
        compared = list(zip(answers["sysdag"][0]["found"], answers["former"][0]["found"], strict=True))
        same = sum(own == other for own, other in compared)
        left_out.append(f"{case}, {model}: the same {samples} texts as the former build for {same} of {count} prompts")
        if same < 0.9 * count:  # the rest are ties within rounding
            raise SystemExit(f"{left_out[-1]}; no speed is reported for a wrong result.")
    found = []
    for way, each in answers.items():
        lengths = [length for answer in each for length in answer["found"]] if what == "sample" else []
        row = {
            "model": model, "case": case, "name": way, "prompts": count, "samples": samples,
            "tokens": sum(lengths), "mean_length": statistics.mean(lengths) if lengths else "",
            "longest": max(lengths) if lengths else "",
        }  # fmt: skip
        for kind in ("seconds", "cpu_seconds"):
            row[kind] = statistics.median(answer[kind] for answer in each)
        done = sum(lengths) / repeats if lengths else count
        row |= {"rate": done / row["seconds"], "cpu_rate": done / row["cpu_seconds"]}
        row["peak_mib"] = max(answer["peak_mib"] for answer in each)
        found.append(row)
    by_name = {row["name"]: row for row in found}
    for row in found:
        for other in ("generate", "former"):
            there = other in by_name
            row[f"times_{other}"] = row["rate"] / by_name[other]["rate"] if there else ""
            row[f"cpu_times_{other}"] = row["cpu_rate"] / by_name[other]["cpu_rate"] if there else ""
        row["of_generates_memory"] = row["peak_mib"] / by_name["generate"]["peak_mib"] if "generate" in by_name else ""
        row["repeats"] = repeats
    return found, left_out


def read_prompts(file: Path) -> list[str]:
    """The different texts under `prompt` or `instruction` of a JSONL file's rows."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = list(dict.fromkeys(row.get("prompt", row.get("instruction")) for row in rows))
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise SystemExit(f"--prompts: {file} needs rows with a text under 'prompt' or 'instruction'.")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    own: dict[str, dict[str, Any]] = {
        "--model": {"metavar": "FOLDER", "help": "a chat model; without it the random one runs alone"},
        "--models": {"choices": ["all", "given", "random"], "default": "all"},
        "--prompts": {"metavar": "FILE.jsonl", "type": Path, "help": "instructions; by default those of the benchmark"},
        "--former": {"metavar": "COMMIT", "default": FORMER},
        "--max-new-tokens": {"type": int, "default": 256},
        "--cases": {"nargs": "*", "choices": list(CASES), "default": list(CASES)},
    }
    options = measure.options(__doc__, "decode", arguments, devices=["cpu"], peers=PEERS, threads=1, repeats=1, own=own)
    models = [(options.model, "given")] if options.model else []
    models = [folder for folder, kind in [*models, (RANDOM, "random")] if options.models in ("all", kind)]
    if not models:
        raise SystemExit("decode: --models given needs --model FOLDER.")
    wanted = measure.wanted(dict.fromkeys(WAYS["64 prompts"]), options.peers, baseline="generate")
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as temporary:
        trees = {"former": former_tree(options.former, Path(temporary))} if "former" in wanted else {}
        for folder in models:
            name = RANDOM if folder == RANDOM else Path(folder).resolve().name
            prompts = random_prompts(64) if folder == RANDOM else INSTRUCTIONS
            if options.prompts is not None and folder != RANDOM:
                prompts = read_prompts(options.prompts)
            for case in options.cases:
                ways = [way for way in WAYS[case] if way in wanted]
                workers = {
                    way: process_of(trees.get(way, ROOT), folder, options.threads or 1, options.max_new_tokens)
                    for way in ways
                }
                found, said = compare(case, name, prompts, workers, options.repeats)
                rows += found
                notes += said
                for worker in workers.values():
                    worker.stop()
    measure.report("decode", rows, options.csv, notes)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2])
