"""Tools that a saved system, and processes of Ray, find by name; each call leaves a line in the file it is given."""

import os
import time
from pathlib import Path

from sysdag import Input, System, node
from sysdag.components import Opaque

LOG = Path(os.environ.get("SYSDAG_TOOL_LOG", os.devnull))


def logged(text):
    with LOG.open("a") as file:
        file.write(text + "\n")
    if text == "bad":
        raise OSError("the service is down")
    return text.upper()


def slow(text):
    time.sleep(0.1)
    return text.upper()


async def later(text):
    return text.upper()


x = Input("x", str)
SLOW = node(Opaque(slow, concurrency=4, retries=2, backoff=0.5), name="slow")(lambda x: x)
LATER = Opaque(later)


@node(Opaque(logged, cache=os.environ.get("SYSDAG_TOOL_CACHE", "tool-calls.jsonl")))
def tool(x):
    return x


@node(Opaque(logged))
def bare(x):
    return x


kept = System(x >> tool)
paid = System(x >> bare)
