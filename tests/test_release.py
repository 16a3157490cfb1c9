"""What a release is made of, built from what is committed and installed where nothing of the checkout is.

Only before a release: `make release-check`.
"""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.release("builds and installs what is published: two minutes")


def run(*command, cwd):
    """Without this checkout on the path."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([str(part) for part in command], cwd=cwd, env=outside, capture_output=True, text=True)
    assert not ended.returncode, f"{command}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}"
    return ended.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Of what git knows, without what was built here."""
    folder = tmp_path_factory.mktemp("release")
    run("git", "-C", ROOT, "checkout-index", "--all", f"--prefix={folder}/source/", cwd=folder)
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=folder / "source")
    (made,) = folder.glob("*.tar.gz")
    return made


@pytest.fixture(scope="module", params=["without torch", "beside torch"])
def wheel(request, sdist):
    """As pip builds it of the source distribution: by itself, and with --no-build-isolation."""
    folder = sdist.parent / request.param.replace(" ", "-")
    options = ["--no-build-isolation"] if request.param == "beside torch" else []
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *options, "-w", folder, sdist, cwd=sdist.parent)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel):
    """The programs of an environment that holds the wheel, and of this one's packages all but sysdag."""
    folder = wheel.parent / "environment"
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=wheel.parent)
    # A line of a .pth file adds a folder, but reads none of that folder's own .pth files: the checkout stays out.
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def names(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return opened.namelist()


def test_the_source_distribution_has_every_source(sdist):
    with tarfile.open(sdist) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    tracked = run("git", "ls-files", "sysdag", "kernels", "csrc", cwd=ROOT).split()
    assert len(tracked) > 300
    assert {*tracked, "setup.py", "pyproject.toml", "README.md", "LICENSE"} - found == set()


def test_the_extension_is_there_where_torch_was(wheel):
    compiled = [name for name in names(wheel) if name.endswith(".so")]
    if wheel.parent.name == "beside-torch":
        assert compiled == ["sysdag/_C.abi3.so"]
        assert "-cp311-abi3-" in wheel.name
    else:
        assert compiled == []
        assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_says_what_pyproject_says(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (place,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(opened.read(place).decode())
        licence = opened.read(place.replace("METADATA", "licenses/LICENSE"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert said["License-Expression"] == project["license"]
    assert said["Requires-Python"] == project["requires-python"]
    required = {line.split(";")[0].strip() for line in said.get_all("Requires-Dist") if "extra ==" not in line}
    assert {each.replace(" ", "") for each in required} == {each.split(";")[0] for each in project["dependencies"]}
    assert set(said.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert {"sysdag/py.typed", "sysdag/kernels/linear_logprob.py"} <= set(names(wheel))


def test_it_works_where_it_is_installed(installed, wheel, tmp_path):
    version = run(installed / "sysdag", "--version", cwd=tmp_path)
    assert version.split()[-1] == importlib.metadata.version("sysdag")
    there = run(installed / "python", "-c", "import sysdag; print(sysdag.__file__)", cwd=tmp_path).strip()
    assert Path(there).is_relative_to(installed.parent)
    environment = run(installed / "sysdag", "env", cwd=tmp_path)
    assert ("cpp on cpu" in environment) == (wheel.parent.name == "beside-torch")
    code = """
import torch
from sysdag.ops import token_logprob
logits = torch.randn(3, 7, requires_grad=True)
found = token_logprob(logits, torch.tensor([0, 3, 6]))
torch.testing.assert_close(found, logits.log_softmax(-1)[range(3), [0, 3, 6]])
found.sum().backward()
"""
    run(installed / "python", "-c", code, cwd=tmp_path)
