"""What options are scored by: vectors against sentence-transformers, logits and likelihoods against transformers."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from tiny import char_tokenizer, llama
from tiny_sentences import FOLDERS, TEXTS, bert, decoder, filled, reranker, texts_of, write_folder
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from sysdag import DataError, Input, PlanError, SerializationError, System, Trace, node
from sysdag.components import BiEncoder, CausalLM, Choice, ChoicePrompt, CrossEncoder, OptionLikelihood
from sysdag.components.language.text_prompts import spelled_in
from sysdag.engine.precompute import weights_hash
from sysdag.execution.execute import node_inputs

FOLDER_FILES = ("modules.json", "config_sentence_transformers.json")
RECORDED = json.loads((Path(__file__).parent / "fixtures" / "sentence_embeddings.json").read_text())
ROWS = [ChoicePrompt(TEXTS[0], TEXTS[1:]), ChoicePrompt("why", ["so", TEXTS[2]])]
LORA = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights="gaussian")


def scored(scorer, prompts=ROWS):
    with torch.no_grad():
        return scorer.scores(prompts)


@pytest.mark.parametrize("name", list(FOLDERS))
def test_vectors_and_similarities_are_those_of_sentence_transformers(name, tmp_path):
    scorer = BiEncoder(write_folder(tmp_path / "model", name))
    texts, recorded = texts_of(name), RECORDED[name]
    with torch.no_grad():
        for kind in ("query", "document"):
            prompt = getattr(scorer.query.recipe, f"{kind}_prompt")
            vectors = scorer.query.encode([prompt + text for text in texts], keeps=False)
            wanted = recorded["queries" if kind == "query" else "documents"]
            torch.testing.assert_close(vectors, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
        found = torch.stack(scorer.scores([ChoicePrompt(text, texts) for text in texts]))
    torch.testing.assert_close(found, torch.tensor(recorded["similarities"]), rtol=1e-5, atol=1e-5)


def test_a_prompt_that_is_not_put_before_documents_is_told(tmp_path, caplog):
    BiEncoder(write_folder(tmp_path / "model", "passage prompt"))
    assert "its prompt 'passage' is not put before options" in caplog.text
    given = BiEncoder(tmp_path / "model", document_prompt="p: ")
    assert given.document.recipe.document_prompt == "p: "


@pytest.mark.parametrize("name", ["cls with prompts", "dense", "joined"])
def test_a_saved_scorer_is_a_folder_that_makes_the_same_vectors(name, tmp_path):
    scorer = BiEncoder(write_folder(tmp_path / "model", name))
    component = Choice(scorer, temperature=0.5)
    before = scored(scorer)
    with torch.no_grad():
        for parameter in scorer.own_parameters().values():
            parameter.mul_(1.03)
    after = scored(scorer)
    assert not torch.allclose(before[0], after[0], atol=1e-4)
    (tmp_path / "saved").mkdir()
    options = json.loads(json.dumps(component.save_pretrained(tmp_path / "saved")))
    loaded = Choice.from_pretrained(tmp_path / "saved", options)
    assert loaded.temperature == 0.5
    for one, other in zip(scored(loaded.scorer), after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    again = BiEncoder(tmp_path / "saved")  # as any folder of sentence-transformers
    torch.testing.assert_close(scored(again)[0], after[0], rtol=1e-6, atol=1e-6)
    fresh = component.fresh()
    torch.testing.assert_close(scored(fresh.scorer)[0], before[0], rtol=1e-6, atol=1e-6)
    fresh.load_weights(tmp_path / "saved")
    torch.testing.assert_close(scored(fresh.scorer)[0], after[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["joined", "joined, then dense"])
def test_vectors_are_joined_in_their_order_after_saving(name, tmp_path):
    (tmp_path / "saved").mkdir()
    component = Choice(BiEncoder(write_folder(tmp_path / "model", name)))
    options = json.loads(json.dumps(component.save_pretrained(tmp_path / "saved")))
    for scorer in (Choice.from_pretrained(tmp_path / "saved", options).scorer, BiEncoder(tmp_path / "saved")):
        with torch.no_grad():
            vectors = scorer.document.encode(TEXTS, keeps=False)
        torch.testing.assert_close(vectors, torch.tensor(RECORDED[name]["documents"]), rtol=1e-5, atol=1e-6)


def test_what_is_cut_off_is_counted_in_the_lower_case_that_is_read(tmp_path):
    scorer = BiEncoder(write_folder(tmp_path, "lower case"))
    text = "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}" * 40  # two characters each in lower case
    assert len(char_tokenizer()(text)["input_ids"]) == 40
    cut = len(char_tokenizer()(text.lower())["input_ids"]) - 64
    assert (cut, scorer.cut_from(ChoicePrompt("why", [text])), scorer.cut_from(ChoicePrompt(text, ["so"]))) == (16,) * 3


def test_an_encoder_of_transformers_has_the_mean_of_its_tokens_and_the_cosine():
    model, tokenizer = bert(), char_tokenizer()
    scorer = BiEncoder(model, tokenizer)

    def vector(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return model(input_ids=ids).last_hidden_state[0].mean(0)

    with torch.no_grad():
        for prompt, found in zip(ROWS, scored(scorer), strict=True):
            wanted = [F.cosine_similarity(vector(prompt.query), vector(text), dim=0) for text in prompt.options]
            torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-6)


def test_texts_are_read_in_a_batch_as_they_are_alone_and_each_once():
    model = decoder()
    scorer = BiEncoder(model, char_tokenizer(), pooling="lasttoken", max_batch_tokens=40)
    read = []
    model.register_forward_pre_hook(lambda m, a, options: read.append(options["input_ids"].shape), with_kwargs=True)
    together = scored(scorer, [ROWS[0], ROWS[1], ROWS[0]])
    assert sum(rows for rows, _ in read) == len({TEXTS[0], *TEXTS[1:], "why", "so"})
    assert all(rows * width <= 40 or rows == 1 for rows, width in read)
    assert torch.equal(together[0], together[2])
    for prompt, found in zip(ROWS, together, strict=False):
        torch.testing.assert_close(found, scored(scorer, [prompt])[0], rtol=1e-5, atol=1e-6)


def test_t5_is_read_by_its_encoder(tmp_path):
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    whole, tokenizer = filled(T5Model(config)), char_tokenizer()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = scored(BiEncoder(tmp_path, similarity="dot"))
    with torch.no_grad():
        vectors = [
            whole.encoder(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)
            for text in (ROWS[1].query, *ROWS[1].options)
        ]
    torch.testing.assert_close(found[1], torch.stack(vectors[1:]) @ vectors[0], rtol=1e-5, atol=1e-5)
    assert isinstance(BiEncoder(tmp_path).module, T5EncoderModel)
    (tmp_path / "saved").mkdir()
    saved = Choice(BiEncoder(tmp_path, similarity="dot")).save_pretrained(tmp_path / "saved")
    loaded = Choice.from_pretrained(tmp_path / "saved", json.loads(json.dumps(saved)))
    loaded.read_from(tmp_path / "saved", trust_remote_code=False)
    torch.testing.assert_close(scored(loaded.scorer)[1], found[1], rtol=1e-6, atol=1e-6)
    with pytest.raises(PlanError, match=r"BiEncoder\('T5Model'\): t5 is an encoder-decoder"):
        BiEncoder(whole, tokenizer)


def test_kept_vectors_are_forgotten_when_weights_move():
    model = bert()
    scorer = BiEncoder(model, char_tokenizer())
    cache = scorer.document.cache
    first = scored(scorer)
    assert cache.encoded == 4
    assert torch.equal(first[0], scored(scorer)[0])
    assert cache.encoded == 4
    weight = model.encoder.layer[0].output.dense.weight
    for move in (
        lambda: weight.data.mul_(1.5),  # past torch's count of versions
        lambda: torch.optim.AdamW([weight], lr=0.1, fused=True).step(),
        lambda: weight.__setattr__("data", weight.data * 1.5),
    ):
        weight.grad = torch.ones_like(weight)
        before, encoded = scored(scorer), cache.encoded
        with torch.no_grad():
            move()
        kept, anew = scored(scorer), scored(BiEncoder(model, char_tokenizer()))
        assert cache.encoded == encoded + 4
        assert not torch.allclose(kept[0], before[0], atol=1e-6)
        torch.testing.assert_close(kept[0], anew[0], rtol=1e-6, atol=1e-6)
    model.train()  # in which dropout would be drawn anew
    encoded = cache.encoded
    scored(scorer)
    assert cache.encoded == encoded
    small = BiEncoder(model.eval(), char_tokenizer(), cache_size=2)
    scored(small)
    assert len(small.document.cache._kept) == 2


def test_gradients_flow_to_both_sides_and_are_those_of_plain_transformers():
    model, tokenizer = bert(), char_tokenizer()
    scorer = BiEncoder(model, tokenizer)
    scored(scorer)  # what is kept is of no use to a gradient
    scorer.scores(ROWS[1:])[0][0].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    one, other = (
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)
        for text in ("why", "so")
    )
    F.cosine_similarity(one, other, dim=0).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_two_towers_and_documents_that_do_not_train():
    queries, documents, tokenizer = bert(), bert(num_hidden_layers=1), char_tokenizer()
    scorer = BiEncoder(
        queries, tokenizer, document_model=documents, document_tokenizer=tokenizer, train_documents=False
    )
    component = Choice(scorer)
    assert {name.split(".")[0] for name in component.own_parameters()} == {"query"}
    component.module.train()
    found = scorer.scores(ROWS)
    assert scorer.document.cache.encoded == 4
    found[0].sum().backward()
    assert all(parameter.grad is None for parameter in documents.parameters())
    assert queries.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    scorer.scores(ROWS)
    assert scorer.document.cache.encoded == 4  # whatever trains, the corpus is encoded once
    reference = component.reference()
    assert reference.scorer.document is scorer.document
    documents.eval()
    apart = BiEncoder(queries.eval(), tokenizer, document_model=documents, document_tokenizer=tokenizer)
    assert {name.split(".")[0] for name in Choice(apart).own_parameters()} == {"query", "document"}
    torch.testing.assert_close(scored(apart)[0], scored(BiEncoder(queries, tokenizer, document_model=documents,
        document_tokenizer=tokenizer, train_documents=False))[0], rtol=0, atol=0)  # fmt: skip
    wide = BiEncoder(queries, tokenizer, document_model=bert(hidden_size=32), document_tokenizer=tokenizer)
    with pytest.raises(PlanError, match="vectors of 16 numbers and options of 32"):
        scored(wide)
    with pytest.raises(PlanError, match="train_documents=False are of a document_model"):
        BiEncoder(queries, tokenizer, train_documents=False)


def test_two_towers_are_saved_beside_each_other(tmp_path):
    for name, model in (("q", bert()), ("d", bert(num_hidden_layers=1))):
        model.save_pretrained(tmp_path / name)
        char_tokenizer().save_pretrained(tmp_path / name)
    scorer = BiEncoder(tmp_path / "q", document_model=tmp_path / "d", query_prompt="q: ", train_documents=False)
    (tmp_path / "saved").mkdir()
    options = Choice(scorer, k=2).save_pretrained(tmp_path / "saved")
    loaded = Choice.from_pretrained(tmp_path / "saved", json.loads(json.dumps(options)))
    assert (loaded.k, loaded.scorer.document.trains, loaded.scorer.query.recipe.query_prompt) == (2, False, "q: ")
    torch.testing.assert_close(scored(loaded.scorer)[0], scored(scorer)[0], rtol=0, atol=0)


def test_a_cross_encoder_gives_the_logit_of_the_pair():
    model, tokenizer = reranker(), char_tokenizer()
    scorer = CrossEncoder(model, tokenizer, max_batch_tokens=90)
    with torch.no_grad():
        for prompt, found in zip(ROWS, scored(scorer), strict=True):
            wanted = []
            for text in prompt.options:
                row = tokenizer(prompt.query, text, return_tensors="pt", truncation=True, max_length=64)
                wanted.append(model(**row).logits[0, 0])
            torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-6)
    assert scorer.cut_from(ROWS[0]) == len(TEXTS[0]) + len(TEXTS[2]) - 64


@pytest.mark.parametrize("pad", [0, None])
def test_a_decoder_that_classifies_reads_pairs_in_a_batch_as_alone(pad):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=128, num_labels=1, pad_token_id=pad)
    model, tokenizer = filled(GPT2ForSequenceClassification(config)), char_tokenizer()
    found = scored(CrossEncoder(model, tokenizer))
    with torch.no_grad():
        for prompt, scores in zip(ROWS, found, strict=True):
            alone = [model(**tokenizer(prompt.query, t, return_tensors="pt")).logits[0, 0] for t in prompt.options]
            torch.testing.assert_close(scores, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_a_head_that_is_not_there_is_new_and_trains_beside_an_adapter(tmp_path):
    bert().save_pretrained(tmp_path / "encoder")
    char_tokenizer().save_pretrained(tmp_path / "encoder")
    component = Choice(CrossEncoder(tmp_path / "encoder", peft_config=LORA))
    assert component.module.config.num_labels == 1
    own = component.own_parameters()
    assert any("classifier" in name for name in own)
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(0.1)
    before = scored(component.scorer)
    (tmp_path / "saved").mkdir()
    options = json.loads(json.dumps(component.save_pretrained(tmp_path / "saved")))
    loaded = Choice.from_pretrained(tmp_path / "saved", options)
    torch.testing.assert_close(scored(loaded.scorer)[0], before[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(PlanError, match=r"CrossEncoder\('BertForSequenceClassification'\): its head has 3 logits"):
        CrossEncoder(reranker(num_labels=3), char_tokenizer())


@pytest.mark.parametrize("per_token", [False, True])
def test_a_likelihood_is_the_language_models_of_the_option_behind_the_query(per_token):
    model, tokenizer = llama(), char_tokenizer()
    scorer = OptionLikelihood(CausalLM(model, tokenizer), per_token=per_token)
    with torch.no_grad():
        for prompt, found in zip(ROWS, scored(scorer), strict=True):
            start = tokenizer(prompt.query)["input_ids"]
            for text, score in zip(prompt.options, found.tolist(), strict=True):
                ids = [*start, *tokenizer(text)["input_ids"], 1]
                log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                terms = [float(log_probs[place - 1, ids[place]]) for place in range(len(start), len(ids))]
                assert score == pytest.approx(sum(terms) / (len(terms) if per_token else 1), rel=1e-6)
    long = ChoicePrompt("a" * 100, ["b" * 80, "c"])
    with pytest.raises(DataError, match="has 81 tokens, and behind the query there is room for") as error:
        scored(scorer, [ROWS[0], long])
    assert error.value.element == 1


def adapted():
    tokenizer = char_tokenizer()
    lm = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    bert_ = LoraConfig(r=4, target_modules=["query", "value"])
    return {
        "bi": BiEncoder(bert(), tokenizer, peft_config=bert_),
        "cross": CrossEncoder(reranker(), tokenizer, peft_config=bert_),
        "likelihood": OptionLikelihood(CausalLM(llama(), tokenizer, peft_config=lm)),
    }


@pytest.mark.parametrize("kind", ["bi", "cross", "likelihood"])
def test_an_adapter_trains_alone_and_the_reference_is_without_it(kind, tmp_path):
    component = Choice(adapted()[kind])
    inputs = [(ROWS[0].query, ROWS[0].options)]
    draws = component.in_context(inputs, component.observe([TEXTS[1]]))
    before = component.log_prob(inputs, draws).detach()
    reference = component.reference()
    own = component.own_parameters()
    assert own
    assert all("lora" in name for name in own)
    for _ in range(3):
        component.log_prob(inputs, draws).sum().backward()
        with torch.no_grad():
            for parameter in own.values():
                parameter.add_(parameter.grad, alpha=0.1 if kind == "likelihood" else 10)
                parameter.grad = None
    after = component.log_prob(inputs, draws).detach()
    assert after > before + 1e-4
    torch.testing.assert_close(reference.log_prob(inputs, draws).detach(), before, rtol=0, atol=0)
    (tmp_path / "saved").mkdir()
    options = json.loads(json.dumps(component.save_pretrained(tmp_path / "saved")))
    loaded = Choice.from_pretrained(tmp_path / "saved", options)
    torch.testing.assert_close(loaded.log_prob(inputs, draws).detach(), after, rtol=1e-6, atol=1e-6)
    moved = component.reference().log_prob(inputs, draws).detach()
    torch.testing.assert_close(moved, after, rtol=1e-6, atol=1e-6)


def broken(folder, file, content):
    (folder / file).write_text(json.dumps(content))
    return folder


def test_folders_that_make_other_vectors_are_refused_by_what_is_in_them(tmp_path):
    def folder(name="mean, normalised"):
        made = tmp_path / str(len(list(tmp_path.iterdir())))
        return write_folder(made, name)

    def modules(*kinds):
        return [{"idx": n, "name": str(n), "path": "", "type": kind} for n, kind in enumerate(kinds)]

    own = "sentence_transformers.models."
    for content, message in (
        (modules(own + "Transformer", own + "Pooling", own + "LSTM"), "its module LSTM .* makes another vector"),
        (modules(own + "Transformer"), "lists no Pooling"),
        (modules("custom.Module"), "its module custom.Module is code of its own"),
    ):
        with pytest.raises(PlanError, match=message):
            BiEncoder(broken(folder(), "modules.json", content))
    with pytest.raises(PlanError, match="similarity must be one of .* got 'manhattan'"):
        BiEncoder(broken(folder(), "config_sentence_transformers.json", {"similarity_fn_name": "manhattan"}))
    with pytest.raises(PlanError, match="include_prompt"):
        BiEncoder(broken(folder("cls with prompts"), "1_Pooling/config.json",
                         {"pooling_mode": "cls", "include_prompt": False}))  # fmt: skip
    options = {"in_features": 16, "out_features": 8, "use_residual": True}
    residual = broken(folder("dense"), "2_Dense/config.json", options)
    with pytest.raises(PlanError, match="Dense layer in '2_Dense' is not served"):
        BiEncoder(residual)
    with pytest.raises(PlanError, match="pooling must be one or several"):
        BiEncoder(bert(), char_tokenizer(), pooling="middle")
    with pytest.raises(PlanError, match="there is no folder"):
        scored(BiEncoder("./not/there"))
    (folder_ := tmp_path / "system").mkdir()
    with pytest.raises(PlanError, match="a saved system; use System.from_pretrained"):
        CrossEncoder(broken(folder_, "system.json", {}))
    with pytest.raises(PlanError, match=r"BiEncoder\(model\) was given a loaded model; pass its tokenizer"):
        BiEncoder(bert())


@pytest.mark.parametrize("kind", ["bi", "cross", "likelihood"])
def test_what_is_no_text_is_named_with_its_row(kind):
    scorer = adapted()[kind]
    with pytest.raises(DataError, match=r"reads texts, got \{'name': 'search'\} as option") as error:
        scored(scorer, [ROWS[0], ChoicePrompt("why", ["so", {"name": "search"}])])
    assert error.value.element == 1
    found = scored(scorer, [ChoicePrompt("why", [{"name": "a"}, {"name": "b"}], read_as=["so", "x"])])
    torch.testing.assert_close(found[0], scored(scorer, [ChoicePrompt("why", ["so", "x"])])[0])


def test_tokens_beyond_the_embeddings_are_named_with_the_row():
    model = filled(BertModel(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                        intermediate_size=16)))  # fmt: skip
    with pytest.raises(DataError, match="has the token id .* but the model has 20") as error:
        scored(BiEncoder(model, char_tokenizer()), [ChoicePrompt("a", ["b"]), ChoicePrompt("a", ["b", "zzz"])])
    assert error.value.element == 1


def test_pieces_count_what_is_computed():
    bi, cross = BiEncoder(bert(), char_tokenizer()), CrossEncoder(reranker(), char_tokenizer())
    [first, second] = bi.pieces(ROWS)
    assert sum(first.values()) == len(TEXTS[0]) + sum(min(64, len(t)) for t in TEXTS[1:])
    assert first.keys() & second.keys() == {("option", TEXTS[2])}
    assert sum(cross.pieces(ROWS)[1].values()) == len("why") * 2 + 2 + len(TEXTS[2])
    component = Choice(bi)
    rows = [("why", TEXTS[1:]), ("so", TEXTS[1:]), ("x", ["a"])]
    draws = component.in_context(rows, component.observe([0, 1, 0]))
    total = sum(min(64, len(text)) for text in TEXTS[1:])
    assert component.micro_batches(rows, draws, total + 5) == [[0, 1], [2]]
    assert component.micro_batches(rows, draws, total + 4) == [[0], [1, 2]]


def test_a_transformer_in_a_folder_of_its_own_is_found_there(tmp_path):
    folder = write_folder(tmp_path / "model", "mean, normalised")
    before = scored(BiEncoder(folder))
    own = folder / "0_Transformer"
    own.mkdir()
    for file in [file for file in folder.iterdir() if file.is_file() and file.name not in FOLDER_FILES]:
        file.rename(own / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = own.name
    broken(folder, "modules.json", modules)
    scorer = BiEncoder(folder, peft_config=LORA)
    assert scorer.query.max_length == 48
    torch.testing.assert_close(scored(scorer)[0], before[0], rtol=1e-6, atol=1e-6)
    (tmp_path / "saved").mkdir()
    options = json.loads(json.dumps(Choice(scorer).save_pretrained(tmp_path / "saved")))
    loaded = Choice.from_pretrained(tmp_path / "saved", options)
    torch.testing.assert_close(scored(loaded.scorer)[0], before[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["bi", "cross", "likelihood"])
def test_a_text_without_tokens_is_named(kind):
    query = {"bi": "why", "cross": "", "likelihood": ""}[kind]
    with pytest.raises(DataError, match="no tokens") as error:
        scored(adapted()[kind], [ROWS[0], ChoicePrompt(query, ["", "so"])])
    assert error.value.element == 1


def test_choices_that_name_one_encoder_put_their_adapters_on_one_model(tmp_path):
    bert().save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    question, passages = Input("question", str), Input("passages", list)
    made = [
        node(Choice(BiEncoder(tmp_path, peft_config=LORA)), name=name)(lambda question, passages: (question, passages))
        for name in ("first", "second")
    ]
    system = System((question & passages) >> made)
    system.compile().sample({"question": ["why"], "passages": [["so", "thus"]]}, seed=0)
    first, second = (system[name].component for name in ("first", "second"))
    assert first.module is second.module
    assert not set(map(id, first.own_parameters().values())) & set(map(id, second.own_parameters().values()))


def test_what_a_reference_is_known_by_changes_with_its_adapters_options():
    def hashed(alpha):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, lora_alpha=alpha, target_modules=["query"])
        tokenizer = char_tokenizer()
        scorer = BiEncoder(bert(), tokenizer, document_model=bert(), document_tokenizer=tokenizer, peft_config=lora)
        return weights_hash(Choice(scorer))

    assert hashed(2) == hashed(2)
    assert hashed(2) != hashed(4)


def test_its_inputs_are_read_in_another_process_as_in_this_one():
    scorer = OptionLikelihood(CausalLM(llama(), char_tokenizer(chat=True), tools=[{"name": "find"}]))
    component = Choice(scorer)
    assert component.row_options == ("tools", "chat_template_kwargs")
    reader = pickle.loads(pickle.dumps(component.input_reader()))
    messages = [{"role": "user", "content": "why"}]
    own = component.with_row_options((messages, ["so"]), {"tools": [{"name": "other"}]})
    assert reader.with_row_options((messages, ["so"]), {"tools": [{"name": "other"}]}) == own
    assert own.query.tools == [{"name": "other"}]
    assert Choice(BiEncoder(bert(), char_tokenizer())).row_options == ()


def test_a_saved_reranker_opens_in_transformers(tmp_path):
    component = Choice(CrossEncoder(reranker(), char_tokenizer()))
    options = component.save_pretrained(tmp_path)
    [(_, code)] = component.usage(tmp_path, options)
    found = {"folder": str(tmp_path)}
    exec(code, found)
    pair = char_tokenizer()("why", "so", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(found["model"](**pair).logits[0, 0], scored(component.scorer)[1][0])


@pytest.mark.parametrize("name", ["dense", "joined, then dense"])
@pytest.mark.parametrize("lora", [None, LORA])
def test_a_saved_encoder_opens_in_sentence_transformers(tmp_path, lora, name):
    scorer = BiEncoder(write_folder(tmp_path / "model", name), peft_config=lora)
    with torch.no_grad():
        for parameter in scorer.own_parameters().values():
            parameter.add_(0.05)
    (tmp_path / "saved").mkdir()
    component = Choice(scorer)
    [(words, code)] = component.usage(tmp_path / "saved", component.save_pretrained(tmp_path / "saved"))
    assert words == "With sentence-transformers:"
    pytest.importorskip("sentence_transformers")
    found = {"folder": str(tmp_path / "saved")}
    exec(code, found)
    model = found["model"]
    queries, documents = model.encode_query([ROWS[0].query]), model.encode_document(list(ROWS[0].options))
    wanted = model.similarity(torch.tensor(queries), torch.tensor(documents))[0]
    torch.testing.assert_close(scored(scorer)[0], wanted, rtol=1e-5, atol=1e-6)


def test_what_a_value_spells_in_a_query_is_text_as_for_a_language_model():
    component = Choice(OptionLikelihood(CausalLM(llama(), char_tokenizer())))
    question, options = Input("question", str), Input("options", list)
    tool = node(component, name="tool")(lambda question, options: (f"{question}? ", options))
    plan = System((question & options) >> tool).compile()
    inputs = {"question": ["is <eos> an end", "why"], "options": [["so", "no"]] * 2}
    first, second = node_inputs(plan, Trace(inputs, {}), "tool").values
    assert (spelled_in(first.query), spelled_in(second.query)) == (((3, 8),), ())
    ids = component.scorer.model.prompt_ids([first.query])[0]
    assert component.scorer.model.tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("kind", ["bi", "cross", "likelihood"])
def test_saved_options_are_those_that_are_written(kind, tmp_path):
    options = json.loads(json.dumps(Choice(adapted()[kind]).save_pretrained(tmp_path)))
    with pytest.raises(SerializationError, match="Choice: k must be of type int or null, got 'two'"):
        Choice.from_pretrained(tmp_path, {**options, "k": "two"})
    with pytest.raises(SerializationError, match="has the option 'trust_remote_code'"):
        Choice.from_pretrained(tmp_path, {**options, "of_scorer": {**options["of_scorer"], "trust_remote_code": True}})
    name = next(iter(options["of_scorer"]))
    left = {key: value for key, value in options["of_scorer"].items() if key != name}
    with pytest.raises(SerializationError, match=f"the saved options have no '{name}'"):
        Choice.from_pretrained(tmp_path, {**options, "of_scorer": left})
    loaded = Choice.from_pretrained(tmp_path, options)
    assert not loaded.trusts_remote_code
    loaded.read_from(tmp_path, trust_remote_code=True)
    assert loaded.trusts_remote_code
