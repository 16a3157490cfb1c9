"""Maps the top-level folder `kernels/` to the package `sysdag.kernels`; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["sysdag", "sysdag.components", "sysdag.kernels"],
    package_dir={"sysdag": "sysdag", "sysdag.kernels": "kernels"},
    package_data={"sysdag": ["py.typed"]},
)
