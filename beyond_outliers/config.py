"""A run's configuration: what a config file says becomes frozen dataclasses here, checked once, before any long work.

Config files (configs/) hold every value with its comment; the dataclasses hold no defaults, only types and the rules that
values obey. `resolve` turns an ml_collections ConfigDict, or what `to_dict` wrote to config.json, into a `Config`.
"""
from __future__ import annotations

import ast
import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

from beyond_outliers.checks import ConfigError, at_least, fraction, nearest, one_of, require
from beyond_outliers.hyperparameters import OPTIMIZERS

SIZES = {
  # Below the study. nano is for trying things out: minutes on a laptop. The ladder is for scaling laws on one machine.
  "nano": dict(blocks=2, heads=3, d_head=128, vocab=2048, context=256, batch_size=8, steps=260),
  "0.3m": dict(blocks=1, heads=3, d_head=32, vocab=2048, context=256, batch_size=16),
  "0.6m": dict(blocks=4, heads=3, d_head=32, vocab=2048, context=256, batch_size=16),
  "1m": dict(blocks=2, heads=6, d_head=32, vocab=2048, context=256, batch_size=16),
  "2m": dict(blocks=4, heads=6, d_head=32, vocab=2048, context=256, batch_size=32),
  # The study's. Blocks and heads of 50m are known; the paper does not give the others, these come to the right totals.
  "50m": dict(blocks=4, heads=6, d_head=128, vocab=32000, context=1024, batch_size=512),
  "125m": dict(blocks=6, heads=9, d_head=128, vocab=32000, context=1024, batch_size=512),
  "350m": dict(blocks=12, heads=12, d_head=128, vocab=32000, context=1024, batch_size=512),
  "500m": dict(blocks=18, heads=12, d_head=128, vocab=32000, context=1024, batch_size=512),
  "760m": dict(blocks=18, heads=15, d_head=128, vocab=32000, context=1024, batch_size=512),
  "1.5b": dict(blocks=25, heads=18, d_head=128, vocab=32000, context=1024, batch_size=512),
}

# What a resumed run may change: none of it enters the numbers beyond the order of floating-point sums.
MAY_CHANGE = ("mesh", "log", "checkpoint", "data.directory", "data.prefetch", "model.remat", "model.unroll", "model.attention",
              "micro_batches", "eval.batch_size")

# Of a run's own numbers, outside the sections.
MINIMUM = dict(seed=0, steps=1, batch_size=1, micro_batches=1, context=1, tokens_per_parameter=0, max_skipped_updates=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
  data: int
  fsdp: int
  model: int

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      require(value == -1 or value >= 1, "mesh." + name, value, "expected a count of devices, or -1 for all that remain")
    sizes = dataclasses.astuple(self)
    require(sizes.count(-1) <= 1, "mesh", sizes, "only one axis may be -1 (all devices that remain)")


@dataclasses.dataclass(frozen=True)
class Model:
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

  def __post_init__(self):
    at_least(self, "model.", vocab=2, blocks=1, heads=1, kv_heads=1, d_head=2, d_model=1, mlp_hidden=1, norm_eps=0,
              rope_base=1, init_std=0, unroll=0)
    one_of(self, "model.", mlp=("relu2", "swiglu"), norm_placement=("post", "pre"), qk_norm=("l2", "rms", "none"),
            attention_scale=("learned", "rsqrt"), rope_layout=("interleaved", "half"),
            dtype=("float32", "bfloat16", "float64"), attention=("plain", "blockwise", "fused"),
            remat=("none", "full", "dots", "dots_with_no_batch_dims"))
    require(self.heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads,
             f"query heads ({self.heads}) must be a multiple of key-value heads")
    require(self.d_head % 2 == 0, "model.d_head", self.d_head, "rotary embedding needs an even head width")


@dataclasses.dataclass(frozen=True)
class Data:
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

  def __post_init__(self):
    one_of(self, "data.", source=("sotu", "text", "jsonl", "parquet", "tfds"), separator=("eot", "bos"),
            reader=("shards", "tfds"))
    at_least(self, "data.", vocab=2, seed=0, shard_tokens=1, readers=1, prefetch=1)
    require(self.source == "sotu" or bool(self.path), "data.path", self.path,
             f"source {self.source!r} reads from a path: give a glob or a directory")
    kind = self.tokenizer.partition(":")[0]
    require(kind in ("bytes", "sentencepiece", "huggingface", "gpt2"), "data.tokenizer", self.tokenizer,
             "expected 'bytes', 'sentencepiece', 'sentencepiece:FILE', 'huggingface:FILE', 'gpt2' or 'gpt2:DIR'")
    require(re.fullmatch(r"newest:[1-9]\d*|fraction:0?\.\d*[1-9]\d*|path:.+", self.validation) is not None, "data.validation",
             self.validation, "expected 'newest:COUNT', 'fraction:0.01' or 'path:GLOB'")


@dataclasses.dataclass(frozen=True)
class QuantRule:
  """Linear layers whose path matches `paths` (a regular expression, whole path) and the recipe that they follow."""
  paths: str
  recipe: str                       # row of quant.RECIPES


@dataclasses.dataclass(frozen=True)
class Quant:
  """What the run's linear layers multiply with. The recipes' names are checked where they are looked up."""
  recipe: str
  backend: str
  rules: dict[str, QuantRule]

  def __post_init__(self):
    one_of(self, "quant.", backend=("aqt", "jax"))


@dataclasses.dataclass(frozen=True)
class Schedule:
  name: str
  warmup: float
  cooldown: float
  start: float
  end: float

  def __post_init__(self):
    one_of(self, "schedule.", name=("trapezoidal", "cosine", "constant"))
    fraction(self, "schedule.", "warmup", "cooldown", "start", "end")
    require(self.warmup + self.cooldown <= 1, "schedule.cooldown", self.cooldown,
             f"warm-up ({self.warmup}) and cool-down together must not exceed the run")


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters whose path matches `paths` (a regular expression, whole path) and the optimizer that trains them."""
  paths: str
  optimizer: Any                    # one of OPTIMIZERS
  optional: bool = False            # whether a model may have no such parameters


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The run's optimizer, and what each parameter group makes of it, in order: the first group that matches wins."""
  default: Any                      # one of OPTIMIZERS
  groups: dict[str, Group]

  @property
  def name(self) -> str:
    return self.default.name

  @property
  def period(self) -> int:
    """Steps after which what a step costs repeats."""
    return max(group.optimizer.period for group in self.groups.values())

  @property
  def learning_rate(self) -> float:
    return self.default.learning_rate


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every: int
  keep: int
  keep_every: int
  verify: bool

  def __post_init__(self):
    at_least(self, "checkpoint.", every=1, keep=1, keep_every=0)


@dataclasses.dataclass(frozen=True)
class Eval:
  every: int
  documents: int
  batch_size: int

  def __post_init__(self):
    at_least(self, "eval.", every=1, documents=0, batch_size=1)


@dataclasses.dataclass(frozen=True)
class Log:
  every: int
  update_statistics: bool
  tensorboard: bool
  wandb: str
  profile_step: int
  profile_steps: int
  quant_statistics: bool = False
  outliers_every: int = 0

  def __post_init__(self):
    at_least(self, "log.", every=1, profile_step=0, profile_steps=1, outliers_every=0)
    require(self.profile_step != 1, "log.profile_step", 1, "expected 2 or more (the first step compiles), or 0: never")


@dataclasses.dataclass(frozen=True)
class Config:
  size: str
  seed: int
  steps: int
  batch_size: int
  micro_batches: int
  context: int
  tokens_per_parameter: int
  max_skipped_updates: int
  warm_start: str
  mesh: Mesh
  model: Model
  data: Data
  optimizer: Optimizer
  schedule: Schedule
  checkpoint: Checkpoint
  eval: Eval
  log: Log
  quant: Quant = Quant("none", "aqt", {"head": QuantRule("head", "none")})

  def __post_init__(self):
    names = {self.quant.recipe, *(rule.recipe for rule in self.quant.rules.values())}
    require(self.model.dtype != "float64" or self.quant.backend == "jax" or names == {"none"}, "quant.backend",
            self.quant.backend, "AQT multiplies in float32; with model.dtype = 'float64' take 'jax'")
    require(self.batch_size % self.micro_batches == 0, "micro_batches", self.micro_batches,
             f"must divide batch_size ({self.batch_size})")
    require(self.data.vocab == self.model.vocab, "model.vocab", self.model.vocab,
             f"must equal data.vocab ({self.data.vocab}); set data.vocab and leave this one derived")
    require(not self.log.profile_step or self.log.profile_step + self.log.profile_steps - 1 <= self.steps, "log.profile_step",
             self.log.profile_step, f"with log.profile_steps = {self.log.profile_steps} the trace must end by step {self.steps}")
    if self.data.reader == "tfds":
      require(self.batch_size % self.data.readers == 0, "data.readers", self.data.readers,
               f"must divide batch_size ({self.batch_size})")


def resolve(config: Any) -> Config:
  """A ConfigDict, or a plain nested dict, as a checked `Config`. Errors: ConfigError (unknown key, type, value)."""
  require(hasattr(config, "keys"), "config", config, "expected a dictionary of sections")
  # First of all, because values of the sections are derived from these.
  for field in MINIMUM:
    _check_minimum(field, config.get(field))
  return _build(Config, _plain(config), "")


def to_dict(config: Config) -> dict[str, Any]:
  """The inverse of `resolve`: plain JSON types, every value written out."""
  tree = dataclasses.asdict(config)
  groups = {label: {**{key: value for key, value in group.items() if key != "optimizer"}, **group["optimizer"]}
            for label, group in tree["optimizer"]["groups"].items()}
  return {**tree, "optimizer": {**tree["optimizer"]["default"], "groups": groups}}


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
  """{dotted key: (old, new)} where two configurations differ."""
  flat_old, flat_new = flatten(to_dict(old)), flatten(to_dict(new))
  return {key: (flat_old.get(key), flat_new.get(key)) for key in sorted(flat_old.keys() | flat_new.keys())
          if flat_old.get(key) != flat_new.get(key)}


def check_resumable(old: Config, new: Config) -> None:
  """Raises ConfigError with the differing keys if `new` would train another model than the run that `old` began."""
  clash = {key: pair for key, pair in differences(old, new).items()
           if not any(key == may or key.startswith(may + ".") for may in MAY_CHANGE)}
  if clash:
    lines = "\n".join(f"  {key}: {was!r} in the workdir, {now!r} now" for key, (was, now) in clash.items())
    raise ConfigError(f"the workdir holds a run of another configuration; give another --workdir. They differ in\n{lines}")


def parse_argument(arg: str) -> tuple[str, dict[str, Any]]:
  """`size,key=value,...`, what follows the colon of --config, as (size, {dotted key: value}). The default size is nano."""
  parts = [part for part in (arg or "").split(",") if part]
  size = parts.pop(0) if parts and "=" not in parts[0] else "nano"
  require(size in SIZES, "size", size, "expected one of " + ", ".join(SIZES))
  overrides = {}
  for part in parts:
    key, equals, text = part.partition("=")
    require(bool(equals), "config argument", part, "expected key=value after the size")
    try:
      overrides[key] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      overrides[key] = {"true": True, "false": False}.get(text.lower(), text)
  return size, overrides


def override(config: Any, overrides: Mapping[str, Any]) -> Any:
  """Sets dotted keys of a ConfigDict in place; a new name below quant.rules is a further rule, behind those that are there.

  Errors: ConfigError with the nearest key, or the expected type."""
  for key, value in overrides.items():
    _check_minimum(key, value)
    node, *rest = config, *key.split(".")
    for depth, name in enumerate(rest):
      known = node.keys() if hasattr(node, "keys") else ()
      if rest[:depth] == ["quant", "rules"] and name not in known and depth + 1 < len(rest):
        with node.unlocked():
          node[name] = type(node)({field.name: "" for field in dataclasses.fields(QuantRule)}).lock()
      elif name not in known:
        raise ConfigError(_unknown(".".join(rest[: depth + 1]), name, known))
      if depth + 1 < len(rest):
        node = node[name]
    try:
      # A ConfigDict makes a number of a bool where it holds a float.
      if isinstance(value, bool) and isinstance(node.get(rest[-1]), float):
        raise TypeError
      node[rest[-1]] = value
    except TypeError:
      kind = type(node[rest[-1]]).__name__
      raise ConfigError(f"{key} = {value!r}: expected {kind}, got {type(value).__name__}") from None
  return config


def _check_minimum(field: str, value: Any) -> None:
  bound = MINIMUM.get(field)
  require(bound is None or not isinstance(value, int) or value >= bound, field, value, f"expected at least {bound}")


def _unknown(path: str, name: str, known: Any) -> str:
  return f"{path}: unknown key; {nearest(name, sorted(known))}"


def _plain(node: Any) -> Any:
  """Nested plain dicts out of a ConfigDict, with references resolved; order kept."""
  return {key: _plain(node[key]) for key in node.keys()} if hasattr(node, "keys") else node


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{dotted key: value} of a nested dictionary."""
  flat = {}
  for key, value in tree.items():
    flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
  return flat


def _build(cls: type, values: Any, path: str) -> Any:
  if cls is Optimizer:
    return _build_optimizer(values)
  require(isinstance(values, Mapping), path.rstrip(".") or "config", values, f"expected the section {cls.__name__}")
  hints = typing.get_type_hints(cls)
  for key in values:
    if key not in hints:
      raise ConfigError(_unknown(path + key, key, hints))
  for field in dataclasses.fields(cls):
    # A default is what a key younger than recorded runs meant before there was one: their configs still resolve.
    if field.name not in values and field.default is dataclasses.MISSING:
      raise ConfigError(f"{path}{field.name}: missing; see its comment in configs/")
  return cls(**{key: _typed(hints[key], value, path + key) for key, value in values.items()})


def _build_optimizer(values: Mapping[str, Any]) -> Optimizer:
  """The optimizer's own keys, then each group's: the group's overrides on top, or another optimizer's keys in full."""
  require(isinstance(values, Mapping), "optimizer", values, "expected a section with a name")
  values = dict(values)
  groups = values.pop("groups", None)
  require(isinstance(groups, Mapping) and bool(groups), "optimizer.groups", groups, "expected {label: {paths: regex, ...}}")
  default = _build(_optimizer_class(values.get("name"), "optimizer.name"), values, "optimizer.")
  if "vector" in groups and "scale" not in groups:       # recorded while learned scales were among the vectors
    groups = {"scale": {**groups["vector"], "paths": r".*/log_scale", "optional": True}, **groups}
  built = {}
  for label, group in groups.items():
    prefix = f"optimizer.groups.{label}."
    require(isinstance(group, Mapping), prefix.rstrip("."), group, "expected {paths: regex, ...}")
    group = dict(group)
    paths = _typed(str, group.pop("paths", None), prefix + "paths")
    optional = _typed(bool, group.pop("optional", False), prefix + "optional")
    try:
      re.compile(paths)
    except re.error as error:
      raise ConfigError(f"{prefix}paths = {paths!r}: not a regular expression ({error})") from None
    name = group.get("name", default.name)
    inherited = values if name == default.name else {}
    built[label] = Group(paths, _build(_optimizer_class(name, prefix + "name"), {**inherited, **group}, prefix), optional)
  return Optimizer(default, built)


def _optimizer_class(name: Any, field: str) -> type:
  require(isinstance(name, str) and name in OPTIMIZERS, field, name, "expected one of " + ", ".join(OPTIMIZERS))
  return OPTIMIZERS[name]


def _typed(kind: Any, value: Any, path: str) -> Any:
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, path + ".")
  if typing.get_origin(kind) is dict:
    require(isinstance(value, Mapping), path, value, "expected a section of sections")
    return {label: _typed(typing.get_args(kind)[1], part, f"{path}.{label}") for label, part in value.items()}
  optional = [k for k in typing.get_args(kind) if k is not type(None)]
  if optional:                                           # X | None
    return None if value is None else _typed(optional[0], value, path)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
  require(fits, path, value, f"expected {kind.__name__}, got {type(value).__name__}")
  return value
