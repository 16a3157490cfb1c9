"""`python -m bench COMMAND`: measurements whose figures the documents quote."""

import importlib
import sys

COMMANDS = {
    "decode": "diverse beam search against transformers 4.56's group beam search",
    "diffusion_error": "the denoising error and its gradient against eager torch",
    "diverse_beam_step": "one step of diverse beam search against per-group processing",
    "linear_logprob": "log-probabilities from hidden states against torch, TRL and bare GEMMs",
    "preference_loss": "the candidate loss and its derivative against its eager reference",
    "theory": "Theorem 1 and the bias of few candidates on an enumerable system",
    "token_logprob": "log-probabilities from logits against torch",
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        listed = "\n".join(f"  {name:18} {what}" for name, what in COMMANDS.items())
        sys.exit(f"usage: python -m bench COMMAND [options]\n\n{listed}")
    command = sys.argv.pop(1)
    importlib.import_module(f"bench.{command}").main()
