"""Tiny encoders that the tests build themselves, and folders of sentence-transformers with them.

`python tests/tiny_sentences.py FILE` writes what sentence-transformers (6.2.0) makes of `TEXTS` with each folder of
`FOLDERS`; tests/fixtures/sentence_embeddings.json was written so.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import char_tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel, Qwen3Config, Qwen3Model

TEXTS = [
    "how long may i keep a book?",
    "four weeks",
    "a late book costs 20 cents a day, and a lost one its price.",
    "x",
]
SMALL = dict(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64,
)  # fmt: skip
# Of each folder: its way to pool, its modules behind, its prompts, its similarity, the longest text.
FOLDERS = {
    "mean, normalised": ("mean", ["Normalize"], {}, "cosine", 48),
    "cls with prompts": ("cls", [], {"query": "query: ", "document": "passage: "}, "dot", None),
    "passage prompt": ("max", [], {"query": "q: ", "passage": "p: "}, "dot", None),
    "dense": ("mean", ["Dense", "Normalize"], {}, "cosine", None),
    "joined": (("mean", "weightedmean", "mean_sqrt_len_tokens"), [], {}, "dot", 20),
    "joined, then dense": (("mean", "cls"), ["Dense"], {}, "dot", None),
    "last token of a decoder": ("lasttoken", ["Normalize"], {"query": "find: "}, "cosine", None),
    "lower case": ("mean", [], {}, "dot", None),
}


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """With weights that depend on no generator."""
    with torch.no_grad():
        for place, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim > 1 or name.endswith("bias"):
                numbers = torch.arange(parameter.numel(), dtype=torch.float64)
                parameter.copy_((torch.sin(numbers * 1.7 + place) * 0.25).view_as(parameter))
    return model.eval()


def bert(**options) -> BertModel:
    return filled(BertModel(BertConfig(**(SMALL | options))))


def reranker(**options) -> BertForSequenceClassification:
    return filled(BertForSequenceClassification(BertConfig(**(SMALL | dict(num_labels=1) | options))))


def decoder() -> Qwen3Model:
    own = dict(num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return filled(Qwen3Model(Qwen3Config(**SMALL, **own)))


def write_folder(folder: Path, name: str) -> Path:
    """The folder of that name in `FOLDERS`, as sentence-transformers lays it out."""
    pooling, behind, prompts, similarity, longest = FOLDERS[name]
    model = decoder() if "decoder" in name else bert()
    model.save_pretrained(folder)
    tokenizer = char_tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    width = 16 * (len(pooling) if isinstance(pooling, tuple) else 1)
    modules = ["Transformer", "Pooling", *behind]
    for place, kind in enumerate(modules[1:], start=1):
        own = folder / f"{place}_{kind}"
        own.mkdir()
        options: dict = {}
        if kind == "Pooling":
            options = {"embedding_dimension": 16, "pooling_mode": pooling, "include_prompt": True}
        if kind == "Dense":
            options = {"in_features": width, "out_features": 8, "bias": True}
            options["activation_function"] = "torch.nn.modules.activation.Tanh"
            linear = filled(torch.nn.Linear(width, 8))
            save_file({f"linear.{key}": value.contiguous() for key, value in linear.state_dict().items()},
                      own / "model.safetensors")  # fmt: skip
        (own / "config.json").write_text(json.dumps(options))
    listed = [
        {"idx": place, "name": str(place), "path": f"{place}_{kind}" if place else "",
         "type": f"sentence_transformers.models.{kind}"}
        for place, kind in enumerate(modules)
    ]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(listed))
    config = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": similarity}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    options = {"max_seq_length": longest, "do_lower_case": name == "lower case"}
    (folder / "sentence_bert_config.json").write_text(json.dumps(options))
    return folder


def texts_of(name: str) -> list[str]:
    return [text.title() for text in TEXTS] if name == "lower case" else TEXTS


def main(file: Path) -> None:
    from sentence_transformers import SentenceTransformer

    found = {}
    for name in FOLDERS:
        with tempfile.TemporaryDirectory() as folder:
            model = SentenceTransformer(str(write_folder(Path(folder), name)), device="cpu")
            queries = [model.encode_query(text) for text in texts_of(name)]  # alone: padding moves a rounding
            documents = [model.encode_document(text) for text in texts_of(name)]
            similarities = model.similarity(torch.tensor(queries), torch.tensor(documents))
            found[name] = {
                "queries": [vector.tolist() for vector in queries],
                "documents": [vector.tolist() for vector in documents],
                "similarities": similarities.tolist(),
            }
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
