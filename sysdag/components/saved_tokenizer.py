"""Tokenizers of folders: as transformers' auto class reads them, or, of what sysdag saved, as they were saved."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def read_tokenizer(source: str | Path, *, as_saved: bool, **options: Any) -> PreTrainedTokenizerBase:
    """What `AutoTokenizer.from_pretrained` reads, unless that is another kind than the folder declares.

    Beside the config of some kinds of models (Qwen2, Qwen3.5, SigLIP 2) transformers 5 reads every tokenizer as the
    kind's own, which splits and normalises in its own way, whatever the folder's files say.

    Args:
        source: a folder, or a name on the Hub.
        as_saved: whether sysdag saved it: then the declared kind is read. Else transformers' choice stands, and a
            warning tells where it splits texts in another way than the folder's file.
        options: of `from_pretrained`.

    Raises:
        OSError, ValueError: as `AutoTokenizer.from_pretrained`.
    """
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(source, **options)
    declared = _declared_class(source)
    if declared is None or declared is type(made):
        return made
    if as_saved:
        return declared.from_pretrained(source, **options)
    if (written := Path(source) / "tokenizer.json").is_file() and _splits(written.read_text("utf-8")) != _splits(
        made.backend_tokenizer.to_str()
    ):
        logger.warning(
            "%s holds a tokenizer of the kind %s, which transformers reads as %s because of the model beside it: it "
            "splits texts in another way than tokenizer.json says. Pass the tokenizer that you want: "
            "%s.from_pretrained(folder).", source, declared.__name__, type(made).__name__, declared.__name__,
        )  # fmt: skip
    return made


def _declared_class(source: str | Path) -> type[PreTrainedTokenizerBase] | None:
    """The class of transformers that a folder's tokenizer was saved from; None where it names no other code's."""
    import transformers

    file = Path(source) / "tokenizer_config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.get("auto_map"):
        return None
    found = getattr(transformers, str(config.get("tokenizer_class")), None)
    is_tokenizer = isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)
    return found if is_tokenizer else None


def _splits(tokenizer: str) -> tuple[Any, Any]:
    """How a tokenizer.json prepares texts before its vocabulary is asked."""
    content = json.loads(tokenizer)
    return content.get("normalizer"), content.get("pre_tokenizer")
