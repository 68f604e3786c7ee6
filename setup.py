"""Packages, requirements and commands for pip. Settings of tools (ruff, pytest, mypy) are in pyproject.toml."""

from setuptools import find_packages, setup

# Packages that the library and its commands need. Tested versions: constraints.txt.
#
# mpi4py is imported only if mpirun or srun starts a preparation of data, and needs an MPI library only then: its wheels
# find the installed one. ninja is left out, as DeepSpeed itself requires it.
CORE = [
    "torch>=2.6",
    "deepspeed>=0.19.7,<0.20",  # before that ZeRO 1 and 2 fail; tested: stlm/training/deepspeed/internals.py
    "numpy>=2.0",
    "datasets>=4.0",
    "pyarrow>=15",
    "tokenizers>=0.20",
    "backports.zstd>=1.0; python_version < '3.14'",
    "sentencepiece>=0.2.3",
    "safetensors>=0.5",
    "tensorboard>=2.18",
    "pyyaml>=6.0",
    "tqdm>=4.66",
    "orjson>=3.10",
    "constriction>=0.4",
    "charset-normalizer>=3.3",
    "webencodings>=0.6",
    "mpi4py>=4.1",
]

EXTRAS = {
    "html": ["resiliparse>=1.0"],  # text out of pages of HTML
    # Languages and their names, and near-duplicates; another rensa signs otherwise.
    "clean": ["py3langid>=0.4", "babel>=2.14", "rensa>=0.5,<0.6"],
    "report": ["matplotlib>=3.10"],  # the plots of DIR/report.html
    "export": ["transformers>=5.24", "gguf>=0.17", "onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.34", "prometheus-client>=0.22"],  # scripts/serve.py
    "wandb": ["wandb>=0.31"],  # training.wandb=true
    "evals": [
        "lm-eval>=0.4.9",
        "scikit-learn>=1.6",
        "scipy>=1.14",
        "pydivsufsort>=0.0.18",
        "pyphen>=0.14",
        "sacrebleu>=2.4",
    ],
    "dev": [
        "resiliparse>=1.0",
        "py3langid>=0.4",
        "babel>=2.14",
        "rensa>=0.5,<0.6",
        "matplotlib>=3.10",
        "transformers>=5.23",
        "gguf>=0.17",
        "onnx>=1.18",
        "onnxscript>=0.5",
        "onnxruntime>=1.20",
        "xllamacpp>=2025.1",
        "accelerate>=1.1",
        "peft>=0.14",
        "trl>=1.0",
        "fastapi>=0.115",
        "uvicorn>=0.34",
        "prometheus-client>=0.22",
        "openai>=2.0",
        "httpx>=0.28",
        "lm-eval>=0.4.9",
        "tenacity>=9.0",
        "scikit-learn>=1.6",
        "scipy>=1.14",
        "pydivsufsort>=0.0.18",
        "pyphen>=0.14",
        "sacrebleu>=2.4",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "codespell>=2.4",
        "mypy>=1.14",
        "types-PyYAML",
        "types-tqdm",
    ],
}

setup(
    name="stlm",
    version="0.1.0",
    description="Super tiny language models: small models trained on text, from two cores to a cluster, on DeepSpeed",
    author="The stlm authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["stlm", "stlm.*", "data_pipeline", "data_pipeline.*"]),
    package_data={"stlm": ["presets/*.yaml", "py.typed"], "data_pipeline": ["py.typed"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["stlm = stlm.commands.program:main"]},
)
