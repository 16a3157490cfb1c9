#!/usr/bin/env bash
# transformers 5.23.0, `generate_batch`: draws of a model with ALiBi are from another distribution, and no error.
#
# Guess: a model whose positions continuous batching does not know is refused, as those with recurrent layers are
# (ValueError: Invalid layer type); what is returned is drawn from the model, as a Llama's is.
# Seen: for BLOOM the log-probabilities that come with the draws are far from those of its own forward; for a Llama of
# the same size they agree to rounding. All that is said is a warning that its attention is not switched. GPT-J, MPT,
# CodeGen and XGLM are like BLOOM.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import BloomConfig, BloomForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers import LlamaConfig, LlamaForCausalLM

BLOOM = BloomForCausalLM, BloomConfig(vocab_size=45, hidden_size=32, n_layer=2, n_head=4)
LLAMA = LlamaForCausalLM, LlamaConfig(
    vocab_size=45, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)


def difference(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    generation = GenerationConfig(do_sample=True, max_new_tokens=8, top_k=0, eos_token_id=44, pad_token_id=0)
    batching = ContinuousBatchingConfig(return_logprobs=True, page_size=32, num_blocks=8, max_batch_tokens=64)
    prompt = list(range(3, 23))
    found = model.generate_batch([prompt], generation_config=generation, continuous_batching_config=batching)
    [output] = found.values()
    ids = torch.tensor([prompt + output.generated_tokens])
    own = type(model)(config).eval()
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = own(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    own_log_probs = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return float((own_log_probs - torch.tensor(output.logprobs)).abs().mean())


llama, bloom = difference(*LLAMA), difference(*BLOOM)
print(f"transformers {transformers.__version__}: Llama {llama:.1e} nats a token off, BLOOM {bloom:.2f}")
assert llama < 1e-3, "a Llama is wrong, too"
assert bloom > 0.1, "BLOOM is right now"
PY
