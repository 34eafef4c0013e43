"""Packaging of jaxmm."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "jaxmm" / "__init__.py").read_text())[1]

REQUIRED = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "tensorflow-datasets>=4.9.10",
    "array_record>=0.8.1",
    "transformers>=5.0",
    "tokenizers>=0.22",
    "ml_collections>=1.1",
    "clu>=0.0.12",
    "jaxtyping>=0.3",
    "numpy>=2.0",
    "pillow>=11.0",
    "safetensors>=0.6",
    "scikit-learn>=1.6",
    "tqdm>=4.67",
    "matplotlib>=3.10",
]
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda13]>=0.10.2"],
    "torch": ["torch>=2.6"],
    "tensorboard": ["tensorflow>=2.19", "tensorboard>=2.19"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.130",
        "ruff>=0.12",
        "import-linter>=2.3",
        "libtpu>=0.0.40; sys_platform == 'linux' and platform_machine == 'x86_64'",  # compiles for TPUs without one
    ],
}

setup(
    name="jaxmm",
    version=VERSION,
    description="Unified multimodal models in JAX: networks that both read images and draw them",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxmm", "jaxmm.*"]),
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["jaxmm = jaxmm.cli:main"]},
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
