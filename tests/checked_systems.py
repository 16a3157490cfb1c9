"""Systems whose data are checked: an LM that writes captions and a diffusion model that draws one image for each; and
two LMs of which one chooses among options. None of the models has weights."""

import tempfile
from pathlib import Path

from tiny import char_tokenizer, llama
from tiny_diffusion import autoencoder, clip, scheduler_of, text_unet, word_tokenizer

from sysdag import Input, System, node
from sysdag.components import Categorical, CausalLM, Diffusion, Opaque

FOLDER = Path(tempfile.mkdtemp(prefix="sysdag-checked-"))


def without_weights(name, component):
    """The folder of a saved model, without what `from_pretrained` would load."""
    component.save_pretrained(FOLDER / name)
    for file in (FOLDER / name).rglob("*.safetensors"):
        file.unlink()
    return FOLDER / name


LM = without_weights("lm", CausalLM(llama(max_position_embeddings=24), char_tokenizer(chat=True)))
PAINTER = without_weights(
    "painter",
    Diffusion(
        text_unet(sample_size=4), scheduler=scheduler_of("epsilon"), text_encoder=clip(), tokenizer=word_tokenizer(),
        vae=autoencoder(channels=3),
    ),
)  # fmt: skip

prompt, question = Input("prompt", str), Input("question")


@node(CausalLM(LM, max_new_tokens=4))
def captions(prompt):
    return prompt


@node
def parts(captions) -> list:
    return captions.split(",")


@node(Diffusion(PAINTER))
def image(parts):
    return parts


pictures = System(prompt >> captions >> parts, parts.each() >> image)


@node(Categorical(["short", "long"], 3))
def route(question):
    return [float(len(question)), 0.0, 0.0]


@node(Opaque(str.upper))
def facts(question):
    return question


@node(CausalLM(LM, max_new_tokens=4))
def answer(question, route, facts):
    return f"{route}:{question}"


questions = System(question >> [route, facts], (question & route & facts) >> answer)
