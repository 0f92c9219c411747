"""Muon on the matrices of the blocks (KellerJordan/Muon), AdamW on the rest, as in the study.

  python -m beyond_outliers.main --config=configs/muon.py               # nano: minutes on a laptop, bundled text
  python -m beyond_outliers.main --config=configs/muon.py:50m           # the study's 50M run
"""
from configs import base

LEARNING_RATE = {"nano": 1e-2, "0.3m": 1e-2} # best of the sweep below; other sizes take the default
DEFAULT_LEARNING_RATE = 3e-2


def get_config(arg: str = ""):
  c = base.get_config(arg)
  # Embedding and vectors: the study's AdamW at its own fixed peak rate, under the same schedule.
  adamw = {"name": "adamw", "learning_rate": 3e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.0}
  c.optimizer = base.optimizer(
    "muon", groups={"embedding": adamw, "vector": adamw},
    learning_rate=LEARNING_RATE.get(c.size, DEFAULT_LEARNING_RATE),
    momentum=0.95,
    nesterov=True,                           # orthogonalise (1 - momentum)·gradient + momentum·average
    nesterov_bias_correction=False,          # False: as published | True: as optax.contrib.muon
    ns_steps=5,                              # Newton-Schulz iterations
    ns_coefficients="quintic",               # quintic (as published) | polar_express
    ns_dtype="bfloat16",                     # of their operands: bfloat16 (as published) | float32
    ns_gram=False,                           # iterate on the small Gram matrix: faster for long matrices, less exact
    scale="original",                        # original: sqrt(max(1, out/in)) | match_rms_adamw: 0.2·sqrt(max(out, in))
    weight_decay=0.0,                        # decoupled
    adam_learning_rate=3e-3,                 # for vectors in a group that Muon trains; the study's groups have none
    adam_b1=0.9, adam_b2=0.95, adam_eps=1e-6)
  return base.finish(c, arg)


def get_hyper(h):
  return h.product([h.sweep("optimizer.learning_rate", [3e-3, 1e-2, 3e-2, 1e-1, 3e-1]), h.sweep("seed", range(3))])
