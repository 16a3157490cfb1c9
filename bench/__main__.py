"""`python -m bench COMMAND`: measurements whose figures the documents quote."""

import importlib
import sys

COMMANDS = {
    "decode": "diverse beam search against transformers 4.56's group beam search",
    "theory": "Theorem 1 and the bias of few candidates on an enumerable system",
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        listed = "\n".join(f"  {name:8} {what}" for name, what in COMMANDS.items())
        sys.exit(f"usage: python -m bench COMMAND [options]\n\n{listed}")
    importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])
