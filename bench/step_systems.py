"""The systems of `python -m bench step`: Qwen2-shaped models with random weights, moved away from their references."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sysdag import Input, System, node
from sysdag.components import CausalLM
from sysdag.data import encode_pairs
from sysdag.engine import SystemModel, accumulate_gradients
from sysdag.execution.likelihood import aligned
from sysdag.objectives import Candidates, EngineOptions, MonteCarlo, ObjectiveOptions
from sysdag.objectives.comparison import SamplingComparison

BETA = 0.1


class Size(NamedTuple):
    """Of models, texts (tokens; words, for a model in a folder) and micro-batches (tokens); `rank` is the adapters'."""

    vocabulary: int
    prompt: int
    completion: int
    micro_batch: int
    shape: dict[str, int]
    rank: int = 16
    folder: str = ""


NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = {
    "small": Size(32000, 256, 64, 640, {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }),
    "0.5B": Size(151936, 512, 128, 4096, {  # Qwen2.5-0.5B's
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2,
    }),
    "narrow": Size(2048, 24, 8, 4096, {**NARROW, "num_hidden_layers": 4}, rank=1),
    "deep": Size(2048, 24, 8, 4096, {**NARROW, "num_hidden_layers": 24}, rank=1),
}  # fmt: skip
PROMPTS = {f"prompt {tokens}": SIZES["small"]._replace(prompt=tokens) for tokens in (128, 512, 1024, 2048, 4096)}
SIZES |= PROMPTS


def size_of(name: str) -> Size:
    """One of `SIZES`, or that of a language model in a folder."""
    return SIZES[name] if name in SIZES else Size(1000, 48, 16, 2**20, {}, folder=name)


class Case(NamedTuple):
    """`nodes` models in a row, each reading the question and the one before; k given paths of latents."""

    system: str
    candidates: int
    lora: bool
    nodes: int = 2
    pairs: int = 1
    size: str = "small"

    @property
    def trained(self) -> str:
        return "LoRA" if self.lora else "full"


def tokenizer(size: Size) -> Any:
    """Words w0 ... of one token each, or the folder's."""
    if size.folder:
        return AutoTokenizer.from_pretrained(size.folder)
    words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, size.vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def model(seed: int, size: Size, device: str) -> Any:
    if size.folder:
        return AutoModelForCausalLM.from_pretrained(size.folder, dtype=torch.float32).to(device).eval()
    config = Qwen2Config(
        vocab_size=size.vocabulary, pad_token_id=0, eos_token_id=1, max_position_embeddings=8192,
        tie_word_embeddings=False, **size.shape,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).eval()


def adapter(size: Size) -> LoraConfig:
    return LoraConfig(r=size.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def text(vocabulary: int, length: int, *seed: int) -> str:
    made = torch.Generator().manual_seed(hash(seed) % 2**31)
    return " ".join(f"w{number}" for number in torch.randint(2, vocabulary, (length,), generator=made).tolist())


def move(module: torch.nn.Module) -> None:
    """Moves what is trained, as an optimizer would."""
    device = next(module.parameters()).device
    made = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.002 * torch.randn(parameter.shape, generator=made, device=device))


class GivenPaths(MonteCarlo):
    """k paths of latents for each prompt, the same for everyone who is measured."""

    def __init__(self, num_candidates: int, size: Size) -> None:
        super().__init__(num_candidates=num_candidates)
        self.size = size

    def paths(self, plan: Any, rows: Any, latents: Any, generator: Any) -> Candidates:
        prompt = tuple(p for p in range(len(rows)) for _ in range(self.num_candidates))
        cells = {
            name: plan.system[name].component.observe(
                [
                    text(self.size.vocabulary, self.size.completion - 1, place, path, 7)
                    for path in range(self.num_candidates)
                    for _ in range(len(rows))
                ]
            )
            for place, name in enumerate(latents)
        }
        return Candidates(rows.select(prompt).updated(cells), prompt)


def build(case: Case, device: str = "cpu") -> tuple[System, list[dict[str, str]]]:
    size, question = size_of(case.size), Input("question")
    words = tokenizer(size)
    made: list[Any] = []
    for place in range(case.nodes):
        peft_config = adapter(size) if case.lora else None
        policy = model(place, size, device)
        component = CausalLM(policy, words, max_new_tokens=size.completion, peft_config=peft_config)
        # A function's parameters are its parents' names. Prompts end where a word does.
        prompt = (
            f"lambda question, node{place - 1}: question + ' ' + node{place - 1} + ' '"
            if place
            else "lambda question: question + ' '"
        )
        made.append(node(component, name=f"node{place}")(eval(prompt)))
    edges = [question >> made[0]]
    edges += [(question & before) >> after for before, after in itertools.pairwise(made)]
    rows = [
        {
            "question": text(size.vocabulary, size.prompt, pair, 1),
            "chosen": text(size.vocabulary, size.completion - 1, pair, 2),
            "rejected": text(size.vocabulary, size.completion - 1, pair, 3),
        }
        for pair in range(case.pairs)
    ]
    return System(*edges), rows


class Step:
    """One case, ready to be computed by sysdag or by others on the same models and data."""

    def __init__(self, case: Case, device: str = "cpu", with_trl: bool = False) -> None:
        torch.manual_seed(0)
        system, rows = build(case, device)
        size = size_of(case.size)
        plan = system.compile()
        objective = "sampling" if case.nodes > 1 else "direct"
        self.case = case
        self.model = SystemModel(
            plan, ObjectiveOptions(objective=objective, beta=BETA), None,
            GivenPaths(case.candidates, size) if case.nodes > 1 else None,
            EngineOptions(engine="two_pass", micro_batch_tokens=size.micro_batch),
        ).to(device)  # fmt: skip
        self.model.move_references(torch.device(device))
        for component in self.model.components.values():
            move(component.module)
        self.pairs = encode_pairs(plan, rows, objective)
        policy = self.model.components["node0"]
        assert isinstance(policy, CausalLM)
        # Its tokens are those of prompt + completion: the space keeps words apart.
        data = [{"prompt": r["question"], "chosen": " " + r["chosen"], "rejected": " " + r["rejected"]} for r in rows]
        made = partial(model, 0, size, policy.device.type)
        self._trl = TrlStep(policy, data, made, adapter(size) if case.lora else None) if with_trl else None

    def cast(self, dtype: torch.dtype) -> None:
        """Weights in another dtype, without gradients; in bf16 adapters stay in fp32, as PEFT keeps them."""
        models = [component.module for component in self.model.components.values()]
        models += [reference.module for reference in self.model.references.values() if isinstance(reference, CausalLM)]
        if self._trl is not None:
            models += [self._trl.trainer.model, self._trl.trainer.ref_model]
        for each in models:
            if each is None:
                continue
            each.config.dtype = dtype
            for parameter in each.parameters():
                parameter.grad = None
                if not (self.case.lora and parameter.requires_grad and dtype == torch.bfloat16):
                    parameter.data = parameter.data.to(dtype)

    def clear(self) -> None:
        """Gradients of 0, whose memory stays."""
        self.model.zero_grad(set_to_none=False)
        if self._trl is not None:
            self._trl.trainer.model.zero_grad(set_to_none=False)

    def run(self, name: str) -> Tensor:
        """Adds the step's gradients and returns its loss."""
        if name == "trl":
            assert self._trl is not None
            return self._trl()
        if name == "straightforward":
            return straightforward_step(self.model, self.pairs)
        self.model.budget.keeps_graphs = name == "one pass"
        output = self.model(self.pairs)
        accumulate_gradients(self.model, output)
        return output.loss.detach()

    def gradients(self, name: str) -> dict[str, Tensor]:
        """Of the policy that `run(name)` differentiates, by our names."""
        if name == "trl" and self._trl is not None:
            theirs = self._trl.trainer.model.named_parameters()
            return {f"policies.node0.{our_name(n)}": p.grad.clone() for n, p in theirs if p.grad is not None}
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def straightforward_step(model: SystemModel, pairs: Sequence[Any]) -> Tensor:
    """Scores of all runs with their graphs, then one backward; the loss.

    Args:
        model: its language models' components; every prompt has equally many candidates.
    """
    plan = model.plan
    comparison = model.compare(pairs, None, None)
    joint: Any = 0.0
    reference: Any = 0.0
    for term in comparison.terms:
        key = next(key for key, own in model.components.items() if own is plan.system[term.name].component)
        elements, draws = aligned(plan, term.trace, term.name)
        sides = []
        for scorer in (model.components[key], model.references[key]):
            assert isinstance(scorer, CausalLM)
            with torch.set_grad_enabled(not sides), scorer.lm.at_work() as module:
                scores = concatenated_forward(scorer, module, elements.values, draws)
            is_latent = isinstance(comparison, SamplingComparison) and term.name in comparison.latents
            sides.append(scores.repeat(2) if is_latent else scores)
        joint, reference = joint + sides[0], reference + sides[1]
    joint, reference = (each.view(2, len(pairs), -1).logsumexp(-1) for each in (joint, reference))
    margins = model.options.beta * ((joint[0] - reference[0]) - (joint[1] - reference[1]))
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    return loss.detach()


def our_name(trl_name: str) -> str:
    """TRL's PeftModel and our adapter in place name the same parameter differently."""
    return trl_name.removeprefix("base_model.model.").replace(".default.", ".sysdag.")


class TrlStep:
    """TRL's loss and gradients for the same policy, reference and preferences, on models of its own.

    (`DPOTrainer` patches the forward of the model that it is given.)

    Args:
        policy: whose weights, or whose adapter's, are copied.
        rows: one batch, as its dataset has them.
        made: loads the model once more; without an adapter it is asked twice.
        peft_config: of the adapter, or None.
    """

    def __init__(
        self, policy: CausalLM, rows: Sequence[Mapping[str, Any]], made: Callable[[], Any], peft_config: Any = None
    ) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        with tempfile.TemporaryDirectory() as folder:
            args = DPOConfig(
                output_dir=folder, beta=BETA, per_device_train_batch_size=len(rows), max_length=None, report_to=[],
                bf16=False, gradient_checkpointing=False, use_cpu=policy.device.type == "cpu", disable_tqdm=True,
            )  # fmt: skip
            self.trainer = DPOTrainer(
                made(), ref_model=None if peft_config else made(), args=args,
                train_dataset=Dataset.from_list([dict(row) for row in rows]), processing_class=policy.tokenizer,
                peft_config=peft_config,
            )  # fmt: skip
        ours = dict(policy.module.named_parameters())
        self.trained = [(name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad]
        with torch.no_grad():
            for name, parameter in self.trained:
                parameter.copy_(ours[our_name(name)])
        examples = self.trainer.train_dataset
        self.batch = self.trainer._prepare_inputs(self.trainer.data_collator([examples[i] for i in range(len(rows))]))
        self.trainer.model.train()

    def __call__(self) -> Tensor:
        loss = self.trainer.compute_loss(self.trainer.model, self.batch)
        loss.backward()
        return loss.detach()


def concatenated_forward(component: CausalLM, module: Any, prompts: list[Any], draws: list[Any]) -> Tensor:
    """One padded batch, its logits, log_softmax and gather; (n,) sums over the completions' tokens."""
    draws = component.in_context(prompts, draws)
    rows = [(ids, draw.record["token_ids"]) for ids, draw in zip(component.prompt_ids(prompts), draws, strict=True)]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, :end] = 1
        scored[row, len(prompt) : end] = 1
    ids, mask, scored = (part.to(component.device) for part in (ids, mask, scored))
    logits = module(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    per_token = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (per_token * scored[:, 1:]).sum(-1)
