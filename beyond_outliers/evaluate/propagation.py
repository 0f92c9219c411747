"""Error propagation: how quantization error enters a network and what each unit does to it.

The decomposition of arXiv 2509.23500 (section 5), for a unit that is f in full precision, with
input h, and f^q quantized, with input hq:

  a = ½{[f^q(hq) − f^q(h)] + [f(hq) − f(h)]}    the incoming error, as the unit passes it on
  b = ½{[f^q(hq) − f(hq)] + [f^q(h) − f(h)]}    the error that quantizing this unit adds
  R = ‖f^q(hq) − f(h)‖² / ‖f(h)‖² = A + B + C,  A = ‖a‖², B = ‖b‖², C = 2⟨a, b⟩, all over ‖f(h)‖²

Legend: B batch (windows), L length.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from beyond_outliers.config.checks import require
from beyond_outliers.evaluate.error_sums import centred, columns, jackknife
from beyond_outliers.evaluate.paired_run import PairedRun, Windows
from beyond_outliers.params import at_any_depth, check_params, leaves_by_path
from beyond_outliers.quant import QuantizedModel
from beyond_outliers.quant.ptq import rotation_fusion
from beyond_outliers.quant.ptq.checks import check_tokens
from beyond_outliers.quant.ptq.methods import method_named
from beyond_outliers.quant.qmatrix import QuantizedMatrix
from beyond_outliers.types import Json, LanguageModel, Params

if TYPE_CHECKING:
  import pandas as pd

# Arrays [B, L]: "tokens", and optionally "segment_ids" and "positions".
Tokens = Mapping[str, Any]

# Settings of initialization and compilation, which don't change the function of the parameters.
EQUIVALENT = {"init_std", "attention", "unroll", "remat"}
FUSED_AGAIN = 1e-5  # of an array's norm: how far fusing rotations may differ between machines


def decompose(
  model: LanguageModel,
  params: Params,
  quantized: QuantizedModel,
  batches: Iterable[Tokens],
  *,
  modules: Sequence[str] | None = None,
  mask_documents: bool = False,
) -> pd.DataFrame:
  """Table with one row per unit, in execution order: name, kind, COLUMNS (see error_sums.py), a
  `_se` of each, and all these again with the prefix `batch_`; and R_centred, R relative to what
  differs between tokens.

  Columns without prefix are means over tokens of each token's ratio; `batch_` ones are ratios of
  sums over all tokens (Frobenius norms). gain is A / R_in of either kind, so tokens are weighted by
  their incoming error. spectral_ratio · alignment_ratio equals it where activations are not
  rounded; with rounding the two are far apart when little error comes in.

  name: `layers/3/mlp/up`; `layers/3/attention`, from its input to its output projection's output,
  and within it `.../scores`, `.../softmax`, `.../values`; `layers/3` for a block; `final_norm`;
  `head`. The embedding is not quantized, so the first block's inputs carry no error.
  model, params: in full precision. quantized: from `quant.ptq.quantize` or `quant.quantized`; where
  that fused rotations, the full-precision run has them too, which leaves its function the same.
  batches: as runs.Run.batches("validation") gives them; "tokens" [B, L] suffice. Tokens of segment
  0 are padding and don't count. modules: regular expressions, one of which must match the whole
  name; None: all units. mask_documents: as the model was trained.
  Errors: ConfigError for a quantized model of another architecture, tokens of another tokenizer, no
  batch, or a pattern that matches no unit."""
  import pandas as pd  # slow to import, and few evaluations need it

  run = paired(model, params, quantized)
  wanted = _wanted(run.kinds(), modules)
  spectral = run.spectral_ratios(wanted)
  found = [
    run.sums(batch, wanted) for batch in windows(batches, model.config.vocab, mask_documents)
  ]
  rows = []
  for name, kind in wanted.items():
    by_window = jax.tree.map(lambda *parts: np.concatenate(parts), *(of[name] for of in found))
    rows.append({"name": name, "kind": kind, **columns(by_window, spectral.get(name, np.nan))})
  return pd.DataFrame(rows)


def final_error(
  model: LanguageModel,
  params: Params,
  quantized: QuantizedModel,
  batches: Iterable[Tokens],
  at: str = "final_norm",
  *,
  centre: bool = False,
  mask_documents: bool = False,
) -> tuple[float, float]:
  """(R_L, its standard error over windows): the error at the end of the network, from two forwards.

  It is R of `decompose` in the final norm's row, or with at="logits" in the head's; with `centre`,
  R_centred there. A few short windows make it cheap; the standard error tells how precise it is.
  Errors: ConfigError, as `decompose`."""
  require(at in ("final_norm", "logits"), "at", at, "expected 'final_norm' or 'logits'")
  run = paired(model, params, quantized)
  found = [
    run.final_sums(batch, at)["batch" if centre else "token"]
    for batch in windows(batches, model.config.vocab, mask_documents)
  ]
  by_window = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
  value, error = jackknife(
    by_window, centred if centre else lambda total: total["R"] / total["out"]
  )
  return float(value), float(error)


def summary(table: pd.DataFrame) -> Json:
  """What an evaluation job keeps of a whole table of `decompose`.

  scores: of `propagation`: R_L at the final norm and at the logits, and R_centred at the former,
  with standard errors, and `inherited`, A's share of R after the last block's last matrix.
  largest_gain: by kind of unit. units: the rows, without `batch_` columns."""
  rows: Any = table.set_index("name")
  last = rows[rows.index.str.endswith("mlp/down")].iloc[-1]
  scores = {
    "R_L": rows.loc["final_norm", "R"],
    "R_L_stderr": rows.loc["final_norm", "R_se"],
    "R_L_centred": rows.loc["final_norm", "R_centred"],
    "R_L_centred_stderr": rows.loc["final_norm", "R_centred_se"],
    "R_L_logits": rows.loc["head", "R"],
    "R_L_logits_stderr": rows.loc["head", "R_se"],
    "inherited": last["A"] / last["R"],
  }
  kept = [column for column in table.columns if not column.startswith("batch_")]
  return {
    "scores": {"propagation": {name: float(value) for name, value in scores.items()}},
    "largest_gain": table.groupby("kind", sort=False)["gain"].max().to_dict(),
    "units": table[kept].to_dict("records"),
  }


def paired(model: LanguageModel, params: Params, quantized: QuantizedModel) -> PairedRun:
  """Both models in one basis: rotations that were fused are fused into the full-precision one too.

  Errors: ConfigError for different architectures, parameters that don't fit the model, and
    parameters other than those that were quantized."""
  check_params(model, params)
  model, fused = model.clone(dot_general_for=None), method_named(quantized.method).fused
  if fused:
    model, params, _ = rotation_fusion.fuse(model, params)
  ours, theirs = (dataclasses.asdict(of_run.config) for of_run in (model, quantized.model))
  unlike = sorted(n for n in ours.keys() - EQUIVALENT if ours[n] != theirs[n])
  require(
    not unlike,
    "quantized",
    ", ".join(f"{name} {theirs[name]}, not {ours[name]}" for name in unlike),
    "another architecture; give what this model was quantized to",
  )
  _check_same_origin(params, quantized.params, FUSED_AGAIN if fused else 0.0)
  return PairedRun((model, quantized.model), (params, quantized.params), quantized.recipe)


def _check_same_origin(params: Params, quantized: Params, tolerance: float) -> None:
  """Refuses parameters other than those that were quantized, by arrays that quantization leaves as
  they are, such as the embedding. tolerance: of an array's norm. Errors: ConfigError."""
  ours = leaves_by_path(params)
  for path, theirs in leaves_by_path(quantized).items():
    if isinstance(theirs, QuantizedMatrix) or path not in ours or theirs is ours[path]:
      continue
    one, other = (np.asarray(x, np.float32) for x in (ours[path], theirs))
    same = np.array_equal(one, other) or (
      np.linalg.norm(one - other) <= tolerance * np.linalg.norm(one)
    )
    remedy = "other parameters were quantized; give those, in their own type, or quantize these"
    require(bool(same), "quantized", f"another {path}", remedy)


def windows(batches: Iterable[Tokens], vocab: int, mask_documents: bool) -> Iterator[Windows]:
  """The batches, on the default device.

  Errors: ConfigError for none, one of another tokenizer, or one without documents to keep apart."""
  any_token = False
  for batch in batches:
    tokens = np.asarray(batch["tokens"])
    if not tokens.size:
      continue
    check_tokens(tokens, vocab, "batches")
    require(
      not mask_documents or {"segment_ids", "positions"} <= batch.keys(),
      "batches",
      ", ".join(sorted(batch)),
      "mask_documents needs segment_ids and positions; use runs.Run.batches",
    )
    tokens_BxL = jnp.asarray(tokens)
    segments_BxL = jnp.asarray(batch.get("segment_ids", np.ones(tokens_BxL.shape, np.int32)))
    masks = (
      (segments_BxL, jnp.asarray(batch["positions"]))
      if mask_documents
      else (None, jnp.arange(tokens_BxL.shape[1]))
    )
    any_token |= bool((segments_BxL > 0).any())
    yield Windows(tokens_BxL, masks, segments_BxL > 0)
  require(any_token, "batches", "none", "the error is measured on tokens; give some")


def _wanted(kinds: dict[str, str], modules: Sequence[str] | None) -> dict[str, str]:
  """The units whose whole names match a pattern. Errors: ConfigError if a pattern matches none."""
  if modules is None:
    return kinds
  for pattern in modules:
    require(
      any(re.fullmatch(pattern, name) for name in kinds),
      "modules",
      pattern,
      "matches no unit; the units are " + ", ".join(dict.fromkeys(map(at_any_depth, kinds))),
    )
  return {n: kind for n, kind in kinds.items() if any(re.fullmatch(p, n) for p in modules)}
