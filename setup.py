"""Packaging: the top-level folders become one importable package, ``minimax_train``.

The folders are named for what they hold. Links in ``minimax_train/`` nest their import names
(``minimax_train.kernels`` and so on), so that installing this distribution never shadows other people's ``kernels``
or ``parallel``, and every module's import path is a file path.
"""

from setuptools import find_packages, setup

_DEBUG = "py-spy>=0.4"
# engine=deepspeed uses classes below deepspeed.initialize.
_DEEPSPEED = "deepspeed>=0.19.8,<0.20; sys_platform == 'linux'"
# engine=megatron uses its classes one by one. 0.16.1 is the last for Python 3.11.
_MEGATRON = "megatron-core>=0.16.1,<0.20; sys_platform == 'linux'"
# minimax-report --wandb
_WORKSPACE = "wandb-workspaces>=0.4.13,<0.5"

setup(
    name="minimax-train",
    version="0.1.0",
    description="Pretraining of hybrid linear-attention mixture-of-experts models",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["minimax_train", "minimax_train.*"]),
    package_data={
        "minimax_train.configs": ["*.yaml", "*/*.yaml"],
        "minimax_train.launch": ["*.sh", "*.sbatch"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "hydra-core>=1.3.2,<1.4",
        "datasets>=5.0",
        "fsspec>=2025.3",
        "pyarrow>=21",
        "tokenizers>=0.22",
        "transformers>=5.0",
        "safetensors>=0.5",
        "rich>=13.7",
        "matplotlib>=3.8",
        "wandb>=0.19",
    ],
    extras_require={
        "cuda": [
            "flash-attn-4[cu13]>=4.0.0b36; sys_platform == 'linux'",
            "quack-kernels[cu13]>=0.6.5,<0.7; sys_platform == 'linux'",
        ],
        "debug": [_DEBUG],
        "tensorboard": ["tensorboard>=2.18"],
        "workspace": [_WORKSPACE],
        "deepspeed": [_DEEPSPEED],
        "megatron": [_MEGATRON],
        # Triton without a GPU: its interpreter runs the kernels. CUDA builds of torch bring their own.
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "setuptools>=77",
            "triton>=3.6; platform_system == 'Linux'",
            "s3fs",  # each release goes with the fsspec of its number
            "moto[server]>=5",
            "tensorboard>=2.18",
            _DEBUG,
            _WORKSPACE,
            _DEEPSPEED,
            _MEGATRON,
        ],
        "lint": ["ruff>=0.9", "pyrefly>=1.4", "pre-commit>=4"],
    },
    entry_points={
        "console_scripts": [
            "minimax-train = minimax_train.__main__:main",
            "minimax-data = minimax_train.data.cli:main",
            "minimax-convert = minimax_train.convert.cli:main",
            "minimax-checkpoint = minimax_train.checkpoint.cli:main",
            "minimax-plan = minimax_train.planner.cli:main",
            "minimax-launch = minimax_train.launch.cli:main",
            "minimax-report = minimax_train.report.cli:main",
        ],
    },
)
