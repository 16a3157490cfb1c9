#!/usr/bin/env bash
# sentence-transformers 6.2.0: encode_document leaves out a prompt that a model has for passages.
#
# Guess: encode_document looks for the prompt "document", "passage" or "corpus", as its docstring says, so of a model
# saved with prompts "query: " and "passage: " (as E5's are) it puts "passage: " before each text.
# Seen: a model that names no prompt "document" has an empty one of that name, which is found first: documents are
# embedded without a prompt, queries with theirs, and nothing is said. So it is after saving and loading too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, models as kinds, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

words = ["[PAD]", "[UNK]", "query", "passage", ":", "a", "cube", "room"]
made = Tokenizer(kinds.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
torch.manual_seed(0)
sizes = dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
BertModel(BertConfig(**sizes)).save_pretrained("bert")
tokenizer.save_pretrained("bert")
body = models.Transformer("bert")
prompts = {"query": "query: ", "passage": "passage: "}
SentenceTransformer(modules=[body, models.Pooling(8)], prompts=prompts, device="cpu").save("saved")
model = SentenceTransformer("saved", device="cpu")


def prompt_of(found):
    """Which prompt an embedding of "a cube" was made with."""
    for name, prompt in {**prompts, "none": ""}.items():
        if torch.allclose(torch.tensor(found), torch.tensor(model.encode("a cube", prompt=prompt)), atol=1e-6):
            return name
    raise AssertionError("none of them")


query, document = prompt_of(model.encode_query("a cube")), prompt_of(model.encode_document("a cube"))
print(f"sentence-transformers {sentence_transformers.__version__}: prompts {model.prompts}")
print(f"encode_query: {query}; encode_document: {document}; prompt_name='passage': "
      f"{prompt_of(model.encode('a cube', prompt_name='passage'))}")
assert query == "query"
assert document == "none", "encode_document takes the prompt for passages now"
PY
