"""Makes the kernels importable as `sysdag.kernels.<op>`, from a wheel and from a checkout.

A wheel holds them in `sysdag/kernels/`, a checkout in the top-level `kernels/`. That folder has no `__init__.py`: with
one, transformers and diffusers would find it in place of Hugging Face's package `kernels`.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_HERE / "kernels", _HERE.parent / "kernels") if folder.is_dir()]
