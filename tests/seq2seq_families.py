"""Tiny encoder-decoders of each family, with tokenizers of their own classes, built here."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import tiny_tokenizers
import torch
import transformers
from tiny_tokenizers import WORDS

BART = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)


def bart_tokenizer() -> Any:
    vocabulary = tiny_tokenizers._vocabulary("bytes", first=("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    return transformers.BartTokenizer(vocab=vocabulary, merges=tiny_tokenizers._merges("bytes"))


def mbart_tokenizer(**languages: str) -> Any:
    table = tiny_tokenizers._scored(("<s>", "<pad>", "</s>", "<unk>"))
    codes = [(code, 0.0) for code in transformers.models.mbart.tokenization_mbart.FAIRSEQ_LANGUAGE_CODES]
    return transformers.MBartTokenizer(vocab=[*table, *codes, ("<mask>", 0.0)], **languages)


def nllb_tokenizer(**languages: str) -> Any:
    codes = transformers.models.nllb.tokenization_nllb.FAIRSEQ_LANGUAGE_CODES
    vocabulary = tiny_tokenizers._vocabulary("marks", first=("<s>", "<pad>", "</s>", "<unk>"), last=(*codes, "<mask>"))
    return transformers.NllbTokenizer(vocab=vocabulary, merges=tiny_tokenizers._merges("marks"), **languages)


@functools.cache
def _pieces(sentence: str, size: int) -> bytes:
    """A SentencePiece model of a text, trained here."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence] * 4), model_writer=model, vocab_size=size, hard_vocab_limit=False,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


GERMAN = (
    "ein dunkles helles rotes Quadrat Kreis Würfel auf über der weiße Raum, zwei schwarze Worte und ein alter Freund"
)


def marian_tokenizer(*, separate: bool = False) -> Any:
    """As opus-mt has it: the source's pieces are English, the target's German, of one vocabulary or of two."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as name:
        folder, pieces = Path(name), []
        for side, text in (("source", WORDS), ("target", GERMAN)):
            (folder / f"{side}.spm").write_bytes(_pieces(text, 60))
            loaded = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
            pieces.append([loaded.id_to_piece(place) for place in range(loaded.get_piece_size())])
        sides = pieces if separate else [[*pieces[0], *pieces[1]]]
        names = ("vocab.json", "target_vocab.json")
        for file, side in zip(names, sides, strict=False):
            ordinary = [piece for piece in dict.fromkeys(side) if piece not in ("<s>", "</s>", "<unk>")]
            tokens = ["</s>", "<unk>", *ordinary, "<pad>"]
            (folder / file).write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
        return transformers.MarianTokenizer(
            source_spm=str(folder / "source.spm"), target_spm=str(folder / "target.spm"),
            vocab=str(folder / "vocab.json"), separate_vocabs=separate,
            target_vocab_file=str(folder / "target_vocab.json") if separate else None,
        )  # fmt: skip


def randomised(model: Any, seed: int = 0, spread: float = 0.35) -> Any:
    """The model with weights under which its distributions are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1 and parameter.requires_grad:  # sinusoids are fixed, and not saved
                    parameter.normal_(0, spread)
            for name, buffer in model.named_buffers():
                if name == "final_logits_bias":
                    buffer.normal_(0, 0.7)
    return model.eval()


def t5(**options: Any) -> tuple[Any, Any]:
    tokenizer = tiny_tokenizers.t5(64)
    config = transformers.T5Config(**({"vocab_size": len(tokenizer)} | T5 | options))
    return randomised(transformers.T5ForConditionalGeneration(config)), tokenizer


def t5_v1_1() -> tuple[Any, Any]:
    return t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def _t5_like(config_class: Any, model_class: Any, **options: Any) -> tuple[Any, Any]:
    tokenizer = tiny_tokenizers.t5(64)
    return randomised(model_class(config_class(vocab_size=len(tokenizer), **(T5 | options)))), tokenizer


def mt5() -> tuple[Any, Any]:
    return _t5_like(transformers.MT5Config, transformers.MT5ForConditionalGeneration)


def umt5() -> tuple[Any, Any]:
    return _t5_like(transformers.UMT5Config, transformers.UMT5ForConditionalGeneration)


def long_t5() -> tuple[Any, Any]:
    return _t5_like(
        transformers.LongT5Config, transformers.LongT5ForConditionalGeneration, local_radius=3,
        encoder_attention_type="transient-global", global_block_size=4,
    )  # fmt: skip


def bart(**options: Any) -> tuple[Any, Any]:
    tokenizer = bart_tokenizer()
    config = transformers.BartConfig(vocab_size=len(tokenizer), **(BART | options))
    model = randomised(transformers.BartForConditionalGeneration(config))
    model.generation_config.forced_bos_token_id = 0
    return model, tokenizer


def _bart_like(name: str, tokenizer: Any, **options: Any) -> tuple[Any, Any]:
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **(BART | options))
    return randomised(getattr(transformers, f"{name}ForConditionalGeneration")(config)), tokenizer


def mvp() -> tuple[Any, Any]:
    return _bart_like("Mvp", bart_tokenizer())


def led() -> tuple[Any, Any]:
    options = {name: value for name, value in BART.items() if name != "max_position_embeddings"}
    tokenizer = bart_tokenizer()
    config = transformers.LEDConfig(
        vocab_size=len(tokenizer), max_encoder_position_embeddings=64, max_decoder_position_embeddings=32,
        attention_window=4, **options,
    )  # fmt: skip
    return randomised(transformers.LEDForConditionalGeneration(config)), tokenizer


def pegasus() -> tuple[Any, Any]:
    tokenizer = transformers.PegasusTokenizer(
        vocab=tiny_tokenizers._scored(("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>"))
    )
    return _bart_like(
        "Pegasus", tokenizer, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=1
    )


def pegasus_x() -> tuple[Any, Any]:
    _, tokenizer = pegasus()
    return _bart_like(
        "PegasusX", tokenizer, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, block_size=4,
        num_global_tokens=2, forced_eos_token_id=1,
    )  # fmt: skip


def blenderbot() -> tuple[Any, Any]:
    model, tokenizer = _bart_like("Blenderbot", bart_tokenizer(), decoder_start_token_id=0)
    model.generation_config.encoder_no_repeat_ngram_size = 3
    return model, tokenizer


def marian(*, separate: bool = False) -> tuple[Any, Any]:
    tokenizer = marian_tokenizer(separate=separate)
    source, pad = len(tokenizer.encoder), tokenizer.pad_token_id
    options: dict[str, Any] = {"share_encoder_decoder_embeddings": not separate}
    if separate:
        target = len(tokenizer.target_encoder)
        options |= {"decoder_vocab_size": target, "tie_word_embeddings": False}
    config = transformers.MarianConfig(
        vocab_size=source, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=pad,
        forced_eos_token_id=tokenizer.eos_token_id, **options, **BART,
    )  # fmt: skip
    model = randomised(transformers.MarianMTModel(config))
    model.generation_config.bad_words_ids = [[pad]]
    return model, tokenizer


def mbart() -> tuple[Any, Any]:
    tokenizer = mbart_tokenizer(src_lang="en_XX", tgt_lang="ro_RO")
    code = tokenizer.convert_tokens_to_ids("ro_RO")
    return _bart_like("MBart", tokenizer, decoder_start_token_id=code, forced_eos_token_id=2)


def nllb() -> tuple[Any, Any]:
    tokenizer = nllb_tokenizer(src_lang="eng_Latn", tgt_lang="fra_Latn")
    return _bart_like("M2M100", tokenizer, decoder_start_token_id=2, pad_token_id=1, eos_token_id=2)


def prophetnet() -> tuple[Any, Any]:
    tokenizer = bart_tokenizer()
    config = transformers.ProphetNetConfig(
        vocab_size=len(tokenizer), hidden_size=32, encoder_ffn_dim=64, num_encoder_layers=2,
        num_encoder_attention_heads=4, decoder_ffn_dim=64, num_decoder_layers=2, num_decoder_attention_heads=4,
        max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return randomised(transformers.ProphetNetForConditionalGeneration(config)), tokenizer


def fsmt() -> tuple[Any, Any]:
    tokenizer = bart_tokenizer()
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=len(tokenizer), tgt_vocab_size=len(tokenizer), activation_dropout=0.0,
        **BART,
    )  # fmt: skip
    return randomised(transformers.FSMTForConditionalGeneration(config)), tokenizer


def bert2bert() -> tuple[Any, Any]:
    tokenizer = bart_tokenizer()
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1,
    )  # fmt: skip
    encoder, decoder = transformers.BertConfig(**sizes), transformers.BertConfig(**sizes)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 1, 2
    model = randomised(transformers.EncoderDecoderModel(config=config))
    model.generation_config.update(decoder_start_token_id=0, eos_token_id=2, pad_token_id=1)
    return model, tokenizer


def t5gemma() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizers.t5(64)
    side = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=4, attention_dropout=0.0,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    config = transformers.T5GemmaConfig(encoder=side, decoder=side, vocab_size=len(tokenizer), dropout_rate=0.0)
    return randomised(transformers.T5GemmaForConditionalGeneration(config)), tokenizer


FAMILIES = {
    made.__name__: made
    for made in (
        t5, t5_v1_1, mt5, umt5, long_t5, bart, mvp, led, pegasus, pegasus_x, blenderbot, marian, mbart, nllb,
        prophetnet, fsmt, bert2bert, t5gemma,
    )
} | {"marian_separate": functools.partial(marian, separate=True)}  # fmt: skip
