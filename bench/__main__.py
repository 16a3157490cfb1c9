"""`python -m bench COMMAND [options]`: measurements whose figures the documents quote.

    python -m bench op|step|all|NAME [--device cpu|cuda] [--peers NAME ...] [--csv [FOLDER]] [--threads N] [--repeats N]

`op` runs the benchmarks of the ops, `all` also those of a training step and of decoding, each in a process of its own,
so that none meets the memory or the caches that another leaves. --csv without a folder writes
bench/results/NAME-DEVICE.csv. Beside sysdag and the baseline, --peers keeps the named peers only; a peer that cannot
run is left out, and the output says why.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence

from bench import measure

OPS = {
    "linear_logprob": "log-probabilities from hidden states against torch, TRL, Liger, CCE and bare products",
    "token_logprob": "log-probabilities from logits against torch",
    "preference_loss": "the candidate loss and its derivative against its eager reference",
    "diverse_beam_step": "one step of diverse beam search against per-group processing",
    "diffusion_error": "the denoising error and its gradient against eager torch",
    "overhead": "host time of the ops on tiny tensors, as a ratio to plain torch's",
}
COMMANDS = OPS | {
    "step": "one optimisation step of a system against a straightforward implementation, and TRL",
    "counts": "what such a step asks of its device, counted: launches, synchronisations, tokens, head rows",
    "diffusion": "a Diffusion-DPO step, and sampling, of a pipeline against diffusers' own",
    "decode": "sampling and search with a language model against generate, generate_batch and a former build",
    "tries": "scoring candidates that share a prompt against a former build and unpacked rows; needs --model",
    "beam_search": "diverse beam search against transformers 4.56's group beam search; needs --peer-python",
    "sweep": "linear_logprob over the number of rows and the vocabulary",
    "gpu": "what a GPU has to show, in the minutes there are: tests, then times; each part is kept as it ends",
    "growth": "time and memory of a step and of commands against k, nodes, the prompt's length and rows of data",
    "study": "the paper's experiments on small systems that train from scratch here; --real: on a pretrained model",
    "reference_free": "a step, and its scores, of a loss without a reference against one with",
    "diversity": "what searches for candidates leave standing on a real language model; needs --model",
    "theory": "Theorem 1 and the bias of few candidates on an enumerable system",
    "plots": "draws docs/images/benchmarks/*.svg from the CSVs in bench/results",
    "tables": "writes the tables of docs/benchmarks.md from the CSVs in bench/results",
}
ALL = [name for name in (*OPS, "step", "diffusion", "decode", "beam_search") if name in COMMANDS]
GROUPS = {"op": ("the ops, one after the other", list(OPS)), "all": (", ".join(ALL), ALL)}


def usage() -> str:
    shown = COMMANDS | {name: what for name, (what, _) in GROUPS.items()}
    listed = "\n".join(f"  {name:18} {what}" for name, what in shown.items())
    return f"usage: python -m bench COMMAND [options]\n\n{listed}\n\npython -m bench COMMAND --help lists the options."


def peers_of(name: str) -> Sequence[str]:
    return getattr(importlib.import_module(f"bench.{name}"), "PEERS", ())


def arguments(options: argparse.Namespace, known: Sequence[str], folder: str | None) -> list[str]:
    """The command line of one member of a group: the group's, with those of its peers that the member has."""
    found = ["--device", options.device]
    for flag, value in {"--threads": options.threads, "--repeats": options.repeats, "--csv": folder}.items():
        found += [flag, str(value)] if value is not None else []
    found += ["--peer-python", options.peer_python] if options.peer_python else []
    return found if options.peers is None else [*found, "--peers", *(peer for peer in options.peers if peer in known)]


def run_group(group: str, given: Sequence[str]) -> None:
    """Each member in its own process; ends with an error that names those that failed."""
    what, names = GROUPS[group]
    peers = {name: peers_of(name) for name in names}
    every = list(dict.fromkeys(peer for known in peers.values() for peer in known))
    options = measure.options(what, group, given, peers=every, repeats=None)
    folder = None if options.csv is None else str(options.csv.parent)
    failed = []
    for name in names:
        if name in ("diffusion", "decode") and options.device != "cpu":
            print(f"{name} is left out: it measures on a CPU", flush=True)
            continue
        if name == "overhead" and options.device != "cpu":
            print("overhead is left out: it measures the host, on tensors of a CPU", flush=True)
            continue
        if name == "beam_search" and (options.device != "cpu" or not options.peer_python):
            print("beam_search is left out: it needs a CPU and --peer-python, see its --help", flush=True)
            continue
        command = [sys.executable, "-m", "bench", name, *arguments(options, peers[name], folder)]
        if subprocess.run(command).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; what it was is above.")


def main(given: Sequence[str]) -> None:
    if given and given[0] in GROUPS:
        return run_group(given[0], given[1:])
    if given and given[0] in COMMANDS:
        return importlib.import_module(f"bench.{given[0]}").main(given[1:])
    if given and given[0] not in ("-h", "--help"):
        sys.exit(f"python -m bench has no command {given[0]!r}.\n\n{usage()}")
    return print(usage())


if __name__ == "__main__":
    main(sys.argv[1:])
