"""Hugging Face families that the model can be, OLMo2 and Llama: parameter names and config.json."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from beyond_outliers import config
from beyond_outliers.config.checks import require
from beyond_outliers.model import hf_files
from beyond_outliers.types import Json


class Family(NamedTuple):
  """A `model_type`: the switches of `config.Model` that produce it, and its parameter names."""

  architecture: str
  switches: Mapping[str, Any]
  names: Mapping[str, str]  # our path -> their name; {} stands for the depth


_SWITCHES = {
  "mlp": "swiglu",
  "norm_gain": "channel",
  "attention_scale": "rsqrt",
  "rope_layout": "half",
}
_NAMES = {
  "embedding": "model.embed_tokens.weight",
  "layers/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
  "layers/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
  "layers/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
  "layers/attention/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
  "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
  "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
  "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
  "final_norm/gain": "model.norm.weight",
  "head/kernel": "lm_head.weight",
}
FAMILIES = {
  "olmo2": Family(
    "Olmo2ForCausalLM",
    {**_SWITCHES, "norm_placement": "post", "qk_norm": "rms"},
    {
      **_NAMES,
      "layers/attention/q_norm/gain": "model.layers.{}.self_attn.q_norm.weight",
      "layers/attention/k_norm/gain": "model.layers.{}.self_attn.k_norm.weight",
      "layers/attention_norm/gain": "model.layers.{}.post_attention_layernorm.weight",
      "layers/mlp_norm/gain": "model.layers.{}.post_feedforward_layernorm.weight",
    },
  ),
  "llama": Family(
    "LlamaForCausalLM",
    {**_SWITCHES, "norm_placement": "pre", "qk_norm": "none"},
    {
      **_NAMES,
      "layers/attention_norm/gain": "model.layers.{}.input_layernorm.weight",
      "layers/mlp_norm/gain": "model.layers.{}.post_attention_layernorm.weight",
    },
  ),
}

# (field of config.Model, field of config.json, type).
FIELDS = (
  ("vocab", "vocab_size", int),
  ("blocks", "num_hidden_layers", int),
  ("heads", "num_attention_heads", int),
  ("kv_heads", "num_key_value_heads", int),
  ("d_model", "hidden_size", int),
  ("d_head", "head_dim", int),
  ("mlp_hidden", "intermediate_size", int),
  ("norm_eps", "rms_norm_eps", float),
  ("init_std", "initializer_range", float),
  ("tied", "tie_word_embeddings", bool),
)
# The value that a config.json implies if it lacks the field or holds null.
ABSENT = {
  "num_key_value_heads": lambda fields: fields["num_attention_heads"],
  "head_dim": lambda fields: fields["hidden_size"] // fields["num_attention_heads"],
  "initializer_range": lambda fields: 0.02,
  "tie_word_embeddings": lambda fields: False,
}
ROPE_BASE_ABSENT = 10000.0  # for configs older than the field
POSITIONS, POSITIONS_ABSENT = "max_position_embeddings", 2048
LARGEST = 2**31 - 1  # of a count or a width
# Fields that change the arithmetic, with the one value we implement. Other fields change nothing.
ONLY = {
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "sliding_window": None,
  "partial_rotary_factor": 1.0,
  "attention_dropout": 0.0,
  "pretraining_tp": 1,
  "quantization_config": None,
}
ROPE_ONLY = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}


# Fields of a source that are not copied: other names for what `to_json` writes, references to code,
# and descriptions of quantization.
NOT_KEPT = ("dtype", "rope_scaling", "auto_map", "quantization_config", "compression_config")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The fields, besides the family, in which a source must equal the model. Others may differ: since
# the model was loaded, blocks may have been dropped or the head untied.
SAME = ("vocab", "heads", "kv_heads", "d_model", "d_head", "mlp_hidden")
ANOTHER = "give the directory of such a model as like, or save model.clone(origin=None)"


def read_config(file: pathlib.Path, dtype: str) -> tuple[Family, config.Model]:
  """The family and the model that a config.json describes.

  Errors: ConfigError naming the file, and the field that is missing or not supported."""
  fields = hf_files.json_object(file)
  try:
    positions(fields)
    return _read_fields(_present(fields), dtype)
  except config.ConfigError as error:
    raise config.ConfigError(f"{file}: {error}") from None


def positions(fields: Mapping[str, Any]) -> int:
  """The longest window of a config.json's model, in tokens. Errors: ConfigError."""
  return _field({POSITIONS: POSITIONS_ABSENT, **_present(fields)}, POSITIONS, int)


def _read_fields(fields: dict[str, Any], dtype: str) -> tuple[Family, config.Model]:
  model_type = fields.pop("model_type", None)
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise config.ConfigError(
      f"model_type = {model_type!r}: expected one of {', '.join(map(repr, FAMILIES))}"
    )
  _check_only(fields, ONLY, "")
  family = FAMILIES[model_type]
  values: dict[str, Any] = {ours: _field(fields, theirs, kind) for ours, theirs, kind in FIELDS}
  return family, config.Model(
    **values,
    **family.switches,
    rope_base=_rope_base(fields),
    dtype=dtype,
    attention="blockwise",
    unroll=1,
    remat="none",
  )


def to_json(
  c: config.Model, dtype: str, source: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> Json:
  """The fields of config.json.

  source: fields of the config.json that the model comes from; kept where this program sets nothing.
  given: POSITIONS and TOKENS that replace the source's.
  Errors: ConfigError when no family has the model's switches, when transformers does not allow its
  widths, and for another model's source or values that the model cannot have."""
  model_type = _model_type(c)
  if c.d_model % c.heads:
    raise config.ConfigError(
      f"model.d_model = {c.d_model}: transformers requires a multiple of model.heads ({c.heads}), "
      "even where model.d_head says otherwise"
    )
  _check_given(c, given)
  kept = {name: value for name, value in (source or {}).items() if name not in NOT_KEPT}
  if source is not None:
    _check_source(c, model_type, _present(kept), given)
  # Tokens that are not given are written as null: if left out, transformers' defaults would apply.
  # With a source they are left out where it leaves them out.
  general = {**(kept or dict.fromkeys(TOKENS)), **given}
  fixed = {name: ONLY[name] for name in ("hidden_act", "attention_bias", "attention_dropout")}
  return {
    **kept,
    "architectures": [FAMILIES[model_type].architecture],
    "model_type": model_type,
    **{theirs: getattr(c, ours) for ours, theirs, _ in FIELDS},
    **fixed,
    **{name: general[name] for name in (POSITIONS, *TOKENS) if name in general},
    "rope_theta": c.rope_base,
    "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
    "torch_dtype": dtype,
  }


def given(
  context: int | None, bos_token_id: int | None, eos_token_id: int | Sequence[int] | None
) -> Json:
  """The arguments of `hf.save` that are not None, as fields of config.json."""
  return _present({POSITIONS: context, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id})


def _check_given(c: config.Model, given: Mapping[str, Any]) -> None:
  if POSITIONS in given:
    _field(given, POSITIONS, int)
  check_token_ids(c, given)


def check_token_ids(c: config.Model, fields: Mapping[str, Any], prefix: str = "") -> None:
  """Refuses TOKENS that the model does not know. Errors: ConfigError."""
  for name, value in _present(fields).items():
    if name in TOKENS:
      ids = value if isinstance(value, Sequence) else [value]
      known = all(type(i) is int and 0 <= i < c.vocab for i in ids)
      remedy = f"; correct it there, or {ANOTHER}" if prefix else ""
      expected = f"expected ids of tokens, 0 to {c.vocab - 1}{remedy}"
      require(known and bool(ids), prefix + name, value, expected)


def _check_source(
  c: config.Model, model_type: str, source: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
  """Refuses another model's source: its tokens would end this one's texts, and `read_config` would
  refuse what was written."""
  like = source.get("model_type")
  require(like == model_type, "like: model_type", like, f"the model is {model_type!r}; {ANOTHER}")
  for ours, theirs, _ in FIELDS:
    if ours in SAME:
      has, absent = getattr(c, ours), ABSENT.get(theirs, lambda fields: None)
      value = source[theirs] if theirs in source else absent(source)
      require(value == has, f"like: {theirs}", value, f"the model has {has}; {ANOTHER}")
  _check_only(source, ONLY, "like: ")
  own = {name: value for name, value in source.items() if name not in given}
  positions(own)
  check_token_ids(c, own, "like: ")


def _model_type(c: config.Model) -> str:
  clashes = {
    model_type: [
      f"model.{field} = {value!r} (here {getattr(c, field)!r})"
      for field, value in family.switches.items()
      if getattr(c, field) != value
    ]
    for model_type, family in FAMILIES.items()
  }
  for model_type, clash in clashes.items():
    if not clash:
      return model_type
  needs = "; ".join(
    f"{model_type} needs {', '.join(clash)}" for model_type, clash in clashes.items()
  )
  raise config.ConfigError(
    f"no Hugging Face family has this architecture: {needs}. Keep it as a checkpoint of its run"
  )


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in fields.items() if value is not None}


def _field(fields: Mapping[str, Any], name: str, kind: type) -> Any:
  if name not in fields and name not in ABSENT:
    raise config.ConfigError(f"{name}: missing from config.json; add it")
  value = fields[name] if name in fields else ABSENT[name](fields)
  # A whole number will do for a float, unless it exceeds all floats.
  value = float(value) if kind is float and type(value) is int and abs(value) < 1e300 else value
  if type(value) is not kind:
    raise config.ConfigError(
      f"{name} = {value!r}: expected {kind.__name__}, got {type(value).__name__}"
    )
  if kind is int:
    require(1 <= value <= LARGEST, name, value, f"expected 1 to {LARGEST}")
  if kind is float:
    require(math.isfinite(value), name, value, "expected a finite number")
  return value


def _check_only(fields: Mapping[str, Any], only: Mapping[str, Any], prefix: str) -> None:
  for name, value in only.items():
    if name in fields and fields[name] != value:
      raise config.ConfigError(
        f"{prefix}{name} = {fields[name]!r}: not supported, only {value!r} is; "
        "choose another checkpoint"
      )


def _rope_base(fields: Mapping[str, Any]) -> float:
  """The rotary base, from `rope_theta` or `rope_parameters` (formerly `rope_scaling`)."""
  bases = {"rope_theta": _field(fields, "rope_theta", float)} if "rope_theta" in fields else {}
  for section in ("rope_parameters", "rope_scaling"):
    rope = _present(_field(fields, section, dict)) if section in fields else {}
    _check_only(rope, ROPE_ONLY, section + ".")
    for name in sorted(rope.keys() - ROPE_ONLY.keys() - {"rope_theta"}):
      raise config.ConfigError(
        f"{section}.{name} = {rope[name]!r}: not supported, only unscaled rotary embedding is; "
        "choose another checkpoint"
      )
    if "rope_theta" in rope:
      bases[f"{section}.rope_theta"] = _field(rope, "rope_theta", float)
  if len(set(bases.values())) > 1:
    listed = ", ".join(f"{name} = {base}" for name, base in bases.items())
    raise config.ConfigError(f"{listed}: they disagree; keep one")
  return next(iter(bases.values()), ROPE_BASE_ABSENT)
