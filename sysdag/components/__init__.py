"""The distributions that a node draws from. Names load on first use, so importing this package loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.components.diffusion.diffusion_model import Diffusion
    from sysdag.components.discrete.categorical import Categorical
    from sysdag.components.discrete.opaque import Opaque
    from sysdag.components.discrete.tabular import Tabular
    from sysdag.components.language.causal_lm import CausalLM
    from sysdag.components.language.encoder_decoder.seq2seq import Seq2Seq
    from sysdag.components.language.engines.choice import Server
    from sysdag.components.language.messages import ChatPrompt
    from sysdag.components.language.vision.image_text_to_text import ImageTextToText
    from sysdag.components.selection.bi_encoder import BiEncoder
    from sysdag.components.selection.choice import Choice
    from sysdag.components.selection.cross_encoder import CrossEncoder
    from sysdag.components.selection.feature_scorer import FeatureScorer
    from sysdag.components.selection.option_likelihood import OptionLikelihood
    from sysdag.components.selection.prompt import ChoicePrompt

__all__ = [
    "BiEncoder",
    "Categorical",
    "CausalLM",
    "ChatPrompt",
    "Choice",
    "ChoicePrompt",
    "CrossEncoder",
    "Diffusion",
    "FeatureScorer",
    "ImageTextToText",
    "Opaque",
    "OptionLikelihood",
    "Seq2Seq",
    "Server",
    "Tabular",
]
__getattr__ = exports(
    __name__,
    {
        "diffusion.diffusion_model": ["Diffusion"],
        "discrete.categorical": ["Categorical"],
        "discrete.opaque": ["Opaque"],
        "discrete.tabular": ["Tabular"],
        "language.causal_lm": ["CausalLM"],
        "language.encoder_decoder.seq2seq": ["Seq2Seq"],
        "language.engines.choice": ["Server"],
        "language.messages": ["ChatPrompt"],
        "language.vision.image_text_to_text": ["ImageTextToText"],
        "selection.bi_encoder": ["BiEncoder"],
        "selection.choice": ["Choice"],
        "selection.cross_encoder": ["CrossEncoder"],
        "selection.feature_scorer": ["FeatureScorer"],
        "selection.option_likelihood": ["OptionLikelihood"],
        "selection.prompt": ["ChoicePrompt"],
    },
)
