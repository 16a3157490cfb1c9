"""Rounds that are killed in every stage, by a signal that no process can catch, and go on.

    python tests/killed_rounds.py FOLDER [--between]

FOLDER has `rounds.yaml` and what that names. Each case runs in a forked process, which is killed where the case says;
another one then goes on in the same folder, `FOLDER/<case>`. `FOLDER/whole` was never cut off. With --between they are
killed after every file instead, before it is written down that the stage is done.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from sysdag.cli import app
from sysdag.execution.trace_file import TraceFile
from sysdag.files import atomic
from sysdag.training import round_stages, rounds
from sysdag.training.round_record import RoundRecord
from sysdag.training.trainer import SysDPOTrainer


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: object, name: str, when: Callable[..., bool]) -> Callable[[], None]:
    """Has a function kill the process instead of doing its work, once `when(*arguments)` says so."""

    def patch() -> None:
        original = getattr(owner, name)

        def patched(*args, **kwargs):
            if when(*args, **kwargs):
                die()
            return original(*args, **kwargs)

        setattr(owner, name, patched)

    return patch


def after(owner: object, name: str, when: Callable[..., bool]) -> Callable[[], None]:
    """As `at`, when the function has done its work."""

    def patch() -> None:
        original = getattr(owner, name)

        def patched(*args, **kwargs):
            result = original(*args, **kwargs)
            if when(*args, **kwargs):
                die()
            return result

        setattr(owner, name, patched)

    return patch


def call(number: int) -> Callable[..., bool]:
    """True at the call of that number, from 1."""
    calls = iter(range(1, 1000))
    return lambda *_, **__: next(calls) == number


def at_step(step: int, folder: str) -> Callable[..., bool]:
    return lambda trainer, *_, **__: trainer.state.global_step == step and trainer.args.output_dir.endswith(folder)


SAVES = 9  # of the record that are a stage's: the start's evaluation, and four a round


def at_end(folder: str) -> Callable[..., bool]:
    """True when the system is saved, and no checkpoint."""
    return lambda trainer, *given, **options: not (given or options) and trainer.args.output_dir.endswith(folder)


CASES: dict[str, Callable[[], None]] = {
    "start": at(TraceFile, "append", lambda file, _: file.batches == 1 and "round-0/" in str(file.path)),
    "sample": at(TraceFile, "append", lambda file, _: file.batches == 1 and "round-2/unfinished-r" in str(file.path)),
    "judge": at(round_stages, "choose_pairs", call(2)),
    "first-steps": at(SysDPOTrainer, "training_step", at_step(1, "round-1")),
    "behind-a-checkpoint": at(SysDPOTrainer, "training_step", at_step(5, "round-2")),
    "behind-the-last-step": at(SysDPOTrainer, "save_model", at_end("round-2")),
    "saving": at(
        atomic, "finish", lambda folder: "round-2" in str(folder) and (folder / ".saved/system.json").exists()
    ),
    "eval": at(TraceFile, "append", lambda file, _: file.batches == 1 and "round-2/unfinished-h" in str(file.path)),
    "best": at(rounds, "copy_system", call(1)),
}
BETWEEN: dict[str, Callable[[], None]] = {
    "runs-written": after(round_stages.Trace, "save", call(4)),
    "pairs-written": after(round_stages, "write_pairs", call(2)),
    "judged": at(round_stages, "write_text", call(2)),
    "best-copied": after(rounds, "copy_system", call(1)),
    **{f"record-{number}": at(RoundRecord, "save", call(number)) for number in range(1, SAVES + 3)},
}


def forked(output: str, patch: Callable[[], None] = lambda: None) -> int:
    """Runs the command in a process of its own; its exit status as `waitpid` gives it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    with silence():
        patch()
        try:
            app(["rounds", "rounds.yaml", "--output-dir", output], standalone_mode=False)
        except BaseException as error:  # noqa: BLE001 - told by the exit code, in a process that ends here
            print(f"{output}: {type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
            os._exit(9)
    os._exit(0)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def main(folder: str, between: str = "") -> None:
    os.chdir(folder)
    assert forked("whole") == 0
    for name, patch in (BETWEEN if between else CASES).items():
        status = forked(name, patch)
        assert os.WIFSIGNALED(status), f"{name}: the process was not killed but ended with {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{name}: {status}"
        assert forked(name) == 0, f"{name} did not go on"


if __name__ == "__main__":
    main(*sys.argv[1:])
