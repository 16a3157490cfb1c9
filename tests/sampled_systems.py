"""Small systems to be run over files of inputs; at the top level of a module, as processes of their own need them."""

import os
import signal
import time
from pathlib import Path

from sysdag import Input, System, loop, node
from sysdag.components import Opaque, Tabular

TABLE = {"a": {"a": 0.6, "b": 0.4}, "b": {"a": 0.3, "b": 0.7}}


class Mortal(Tabular):
    """Kills its process once, where the file that `SYSDAG_TEST_KILL` names exists."""

    def sample(self, inputs, *, generator=None):
        order = os.environ.get("SYSDAG_TEST_KILL")
        if order and Path(order).exists():
            Path(order).unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(inputs, generator=generator)


class Absent(Tabular):
    """Its weights are not to be had."""

    @property
    def module(self):
        raise OSError("no such model")


x = Input("x", str)
y = Input("y")
shared = Mortal(TABLE)


@node(shared)
def coin(x):
    return x


@node(shared)
def turn(coin):
    return coin


@node
def letters(turn) -> list:
    return [turn, "a", "b"][: 1 + (turn == "a")]


@node(shared)
def spread(letters):
    return letters


@node
def slow(coin):
    time.sleep(0.02)
    return coin


@node
def reciprocal(y):
    return 1 / y


@node
def unwritable(y):
    return object() if y == 0 else y


@node(Opaque(str.upper))
def upper(x, y):
    return x * y


looped = System(x >> coin, loop(coin >> turn, carry={"coin": turn}, times=2), turn >> letters, letters.each() >> spread)
sleepy = System(x >> coin >> slow)
dividing = System(y >> reciprocal)
odd = System(y >> unwritable)
two_inputs = System((x & y) >> upper)
