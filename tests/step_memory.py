"""A step of a system whose memory is measured, as the tests of estimates measure it."""

import sys
from pathlib import Path

from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, ObjectiveOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import measure


def model_of(plan, engine, micro_batch_tokens, checkpointing):
    options = EngineOptions(engine=engine, micro_batch_tokens=micro_batch_tokens)
    model = SystemModel(plan, ObjectiveOptions(beta=0.2), engine=options)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    return model


def peak_of(model, compute):
    """Bytes that a step takes beyond what is there after a first one."""
    accumulate_gradients(model, compute())
    with measure.PeakMemory("cpu") as memory:
        accumulate_gradients(model, compute())
    return memory.mib * 2**20
