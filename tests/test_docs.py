"""README.md and the pages of docs/: every block of Python and every `sysdag` command in them runs, and the site builds.

The blocks of a page run in order, as one module, in a folder of its own. There the stand-ins of
examples/systems/stand_ins.py lie under the names of the Hub's models, which transformers and diffusers take before the
Hub. A block with a `title="..."` is a file of that name; a block of Python that is one is imported, too. Comments right
above a block change what is done with it:

    <!-- output -->             the block is what the block before it prints
    <!-- raises: GraphError --> it ends in that error; the `output` below it is its message
    <!-- not run: reason -->    it is left out; all of these are listed in NOT_RUN
"""

import contextlib
import importlib
import io
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("datasets")

from tiny import shorten_completions
from typer.testing import CliRunner

import sysdag
from sysdag.cli import app
from sysdag.saving.loading import load_system

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\S*)([^\n]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!-- (output|raises|not run)(?:: ([^\n]+?))? -->\s*\Z")
TITLE = re.compile(r'title="([^"]+)"')
# What a page's blocks use and do not make.
GIVEN = {
    "README.md": "pairs = [dict(question=f'What is {i}?', chosen='a number', rejected='no idea') for i in range(4)]"
}
NOT_RUN = {
    "docs/commands.md": ["the tutorial runs these"],
    "docs/decoding.md": ["needs a server"],
    "docs/llm-diffusion.md": ["the stand-in is a folder of parts; tests/test_lora_pipelines.py runs these lines"],
    "docs/multi-gpu.md": ["needs several GPUs, or two processes"],
    "docs/preferences.md": ["needs an endpoint", "waits for people", "waits for people"],
}
# Of a shell block, these are run; the rest installs, needs a GPU, or is another program's.
COMMANDS = ("sysdag", "python examples/systems/")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    title: str | None
    text: str
    mark: str | None
    about: str | None

    @property
    def place(self) -> str:
        return f"{self.page.name}, line {self.line}"


def blocks_of(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        indent, language, rest, body = fence.groups()
        mark = COMMENT.search(text[: fence.start()].rstrip(" "))
        title = TITLE.search(rest)
        line = text.count("\n", 0, fence.start()) + 2
        body = textwrap.dedent(body) if indent else body
        kind, about = mark.groups() if mark else (None, None)
        found.append(Block(page, line, language, title and title.group(1), body, kind, about))
    return found


class Reader:
    """Follows one page as its reader would, in the current folder."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.module = types.ModuleType("page_" + re.sub(r"\W", "_", page.stem))
        self.module.__file__ = str(page)
        sys.modules[self.module.__name__] = self.module
        exec(GIVEN.get(page.name, ""), self.module.__dict__)
        self.printed = ""

    def follow(self) -> None:
        for block in blocks_of(self.page):
            if block.mark == "not run":
                continue
            if block.mark == "output":
                assert squeeze(block.text) in squeeze(self.printed), f"{block.place}: printed was\n{self.printed}"
            elif block.title is not None:
                self.write(block)
            elif block.language == "python":
                self.run(block)
            elif block.language in ("bash", "console"):
                self.printed = "".join(map(lambda line: self.shell(line, block), commands(block)))

    def write(self, block: Block) -> None:
        file = Path(block.title)
        file.write_text(block.text, encoding="utf-8")
        if file.suffix == ".py":
            sys.modules.pop(file.stem, None)
            importlib.invalidate_caches()
            importlib.import_module(file.stem)

    def run(self, block: Block) -> None:
        code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec", dont_inherit=True)
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                exec(code, self.module.__dict__)
        except Exception as error:
            if block.mark == "raises" and type(error).__name__ == block.about:
                self.printed = f"{type(error).__name__}: {error}"
                return
            error.add_note(f"In the block at {block.place}.")
            raise
        assert block.mark != "raises", f"{block.place}: expected {block.about}"
        self.printed = output.getvalue()

    def shell(self, line: str, block: Block) -> str:
        program, *arguments = shlex.split(line, comments=True)
        if program == "sysdag":
            result = CliRunner().invoke(app, arguments)
            expected = 1 if block.mark == "raises" else 0
            assert result.exit_code == expected, f"{block.place}: {line}\n{result.output}\n{result.exception!r}"
            return result.output
        with pytest.MonkeyPatch.context() as patch:
            script = ROOT / arguments[0]
            patch.setattr(sys, "argv", [str(script), *arguments[1:]])
            patch.syspath_prepend(script.parent)
            runpy.run_path(str(script), run_name="__main__")
        return ""


def commands(block: Block) -> list[str]:
    """The lines of a shell block that are run, continued ones joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(COMMANDS)]


def squeeze(text: str) -> str:
    """Text without differences of white space, and without the line breaks of long messages."""
    return " ".join(text.split())


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with all stand-ins, and two more for the README's names."""
    folder = tmp_path_factory.mktemp("hub")
    made = runpy.run_path(str(ROOT / "examples" / "systems" / "stand_ins.py"))
    made["write"](list(made["KINDS"]), folder)
    for seed, name in enumerate(("org/drafter", "org/refiner"), start=9):
        made["language_model"](folder / name, seed)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("known_losses")
def test_what_a_page_shows_runs(page, stand_ins, tmp_path, monkeypatch):
    if page.name == "architecture.md":
        pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    shorten_completions(monkeypatch)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # commands add to it
    for organisation in stand_ins.iterdir():
        (tmp_path / organisation.name).symlink_to(organisation)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    known = set(sys.modules)
    try:
        Reader(page).follow()
    finally:
        for name in set(sys.modules) - known:
            file = Path(getattr(sys.modules[name], "__file__", None) or "/").resolve()
            if any(file.is_relative_to(folder) for folder in (tmp_path, ROOT / "examples", ROOT / "docs")):
                del sys.modules[name]


def test_blocks_that_are_not_run_are_known_and_say_why():
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for block in blocks_of(page):
            if block.mark == "not run":
                assert block.about, f"{block.place}: <!-- not run --> needs a reason"
                found.setdefault(str(page.relative_to(ROOT)), []).append(block.about)
    assert found == NOT_RUN


def test_blocks_are_found_where_they_stand(tmp_path):
    """The reader itself: marks, titles, lines, outputs that differ, errors that do not come."""
    page = tmp_path / "page.md"

    def follow(text):
        page.write_text(text)
        Reader(page).follow()

    (first, second) = blocks_of_text(
        page, 'a\n\n```python title="x.py"\nb = 1\n```\n<!-- not run: why -->\n```bash\nc\n```\n'
    )
    assert (first.title, first.line, first.mark, first.text) == ("x.py", 4, None, "b = 1\n")
    assert (second.language, second.mark, second.about) == ("bash", "not run", "why")
    follow("```python\nprint(1,\n2)\n```\n\n<!-- output -->\n```text\n1   2\n```\n")
    with pytest.raises(AssertionError, match="printed was"):
        follow("```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="expected KeyError"):
        follow("<!-- raises: KeyError -->\n```python\npass\n```\n")
    with pytest.raises(ZeroDivisionError):
        follow("<!-- raises: KeyError -->\n```python\n1 / 0\n```\n")
    with pytest.raises(AssertionError, match="No such command"):
        follow("```bash\nsysdag nonsense\n```\n")


def blocks_of_text(page: Path, text: str) -> list[Block]:
    page.write_text(text)
    return blocks_of(page)


def test_the_readme_can_be_read_in_one_sitting():
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024


def test_relative_links_and_pictures_of_the_readme_exist():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link


NAME = re.compile(r"(?<![\w./@:-])sysdag(?:\.[A-Za-z_]\w*)+")
PATH = re.compile(r"(?<![\w./-])(?:sysdag|docs|tests|bench|kernels|csrc|examples)/[\w./*-]*[\w*/]")
NOT_THERE = {
    "sysdag.trace": "a key in Parquet files",
    "sysdag/kernels/": "of a wheel",
    "sysdag.kernels.squared_norm": "architecture.md shows how to add it",
    "sysdag/ops/squared_norm.py": "architecture.md shows how to add it",
    "kernels/squared_norm.py": "architecture.md shows how to add it",
}


def gone(text: str) -> list[str]:
    """The dotted names of sysdag and the paths of the checkout in a text that stand for nothing."""
    missing = []
    for name in NAME.findall(text):
        try:
            found_at(name if not name.startswith("sysdag._C") else "sysdag")  # the extension may not be built
        except AttributeError:
            missing.append(name)
    for path in PATH.findall(text):
        pattern = re.sub(r"[A-Z]{3,}", "*", path.rstrip("/"))  # NAME-DEVICE.csv
        if next(ROOT.glob(pattern), None) is None:
            missing.append(path)
    return [each for each in missing if each not in NOT_THERE]


def test_names_and_paths_that_are_told_are_there():
    """In the documents, and in the code's docstrings and comments."""
    pytest.importorskip("fastapi")
    pytest.importorskip("triton")
    told = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "Makefile", ROOT / "mkdocs.yml", *(ROOT / "csrc").glob("*.*")]
    for folder in ("sysdag", "kernels", "bench", "examples", "docs"):
        told += [path for ending in ("py", "md") for path in (ROOT / folder).rglob(f"*.{ending}")]
    missing = {str(path.relative_to(ROOT)): gone(path.read_text(encoding="utf-8")) for path in told}
    assert len(missing) > 200
    assert {path: names for path, names in missing.items() if names} == {}


def test_what_is_gone_is_seen():
    assert gone("`sysdag.graph.System`, sysdag.ops.token_logprob, tests/ops/, `bench/results/op-DEVICE.csv`") == [
        "bench/results/op-DEVICE.csv"
    ]
    assert gone("see `sysdag.readers`, `sysdag.graph.plan.Plans`, tests/test_layers.py and sysdag/engine.py.") == [
        "sysdag.readers", "sysdag.graph.plan.Plans", "tests/test_layers.py", "sysdag/engine.py",
    ]  # fmt: skip


@pytest.mark.parametrize("picture", sorted((DOCS / "pictures").glob("*.svg")), ids=lambda picture: picture.stem)
def test_pictures_show_the_examples_as_they_are(picture, monkeypatch):
    """`python docs/pictures.py` draws them; matplotlib writes each text into the file as a comment, too."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        system = load_system(f"{ROOT / 'examples' / 'systems' / picture.stem}.py:system")
    finally:
        sys.modules.pop(picture.stem, None)
    found = [text.strip() for text in re.findall(r"<!-- (.+?) -->", picture.read_text(encoding="utf-8"))]
    shown = [text for text in found if not text.startswith("on the model of ")]
    drawn = [given.name for given in system.inputs]
    for name in system.compile().order:
        drawn += [name, type(system[name].component).__name__] if system[name].is_random else [name]
    branches = [value for made in system.switches for case in made.cases for value in case.values]
    assert shown[: len(drawn)] == drawn
    assert sorted(shown[len(drawn) :]) == sorted(branches)


def found_at(path: str) -> object:
    """What a dotted name stands for: a module, or an attribute below one.

    A module comes first: an op's file has the name of its op.

    Raises:
        AttributeError: if it stands for nothing.
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(parts[0]):
                raise
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AttributeError(f"no module {parts[0]}")


def documented() -> list[tuple[str, object]]:
    """Each name that a page of the reference describes, and what it stands for."""
    entry = re.compile(r"^::: (\S+)$((?:\n +.*$)*)", re.MULTILINE)
    found = []
    for page in sorted((DOCS / "api").glob("*.md")):
        for path, options in entry.findall(page.read_text(encoding="utf-8")):
            target = found_at(path)
            if not isinstance(target, types.ModuleType):
                found.append((path, target))
                continue
            members = re.search(r"members: \[([^]]+)\]", options)
            own = [name for name, value in vars(target).items() if getattr(value, "__module__", None) == path]
            for name in members[1].split(", ") if members else own:
                found.append((f"{path}.{name}", getattr(target, name)))
    return found


PACKAGES = ["sysdag"] + [
    package.name
    for package in pkgutil.walk_packages(sysdag.__path__, "sysdag.")
    if package.ispkg and hasattr(importlib.import_module(package.name), "__all__")
]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_has_one_home_in_the_reference(name):
    pytest.importorskip("fastapi")
    package = importlib.import_module(name)
    reference = documented()
    for public in package.__all__:
        homes = [path for path, target in reference if target is getattr(package, public)]
        assert len(homes) == 1, f"{name}.{public} is described at {homes or 'no place'} of docs/api"


def test_the_site_builds_strictly_and_asks_no_other_server(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = [page.relative_to(DOCS).with_suffix("") for page in PAGES if page.is_relative_to(DOCS)]
    for page in pages:
        html = tmp_path / "site" / (page.parent if page.name == "index" else page) / "index.html"
        text = html.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe|link)[^>]+(?:src|href)="(https?://[^"]+)"', text)
        assert not fetched, (page, fetched)
        assert 'class="mermaid"' not in text  # its renderer would come from another server
    reference = (tmp_path / "site" / "api" / "graph" / "index.html").read_text(encoding="utf-8")
    assert 'id="sysdag.graph.loop"' in reference
    assert "Unrolls a feedback loop into visits that share weights" in reference


def test_the_faq_gives_the_readmes_figures_of_the_demo():
    faq, readme = (" ".join((ROOT / name).read_text(encoding="utf-8").split()) for name in ("docs/faq.md", "README.md"))
    found = re.search(r"exactly three captions fall from about (\d+ % to \d+ % and \d+ %)", faq)
    assert found is not None
    assert f"{found.group(1)}; the others count as failures above" in readme
