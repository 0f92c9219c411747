"""Scion without constraint (arXiv 2502.07529): spectral steps for matrices, signs for the embedding, as in the study.

  python -m beyond_outliers.main --config=configs/scion.py               # nano: minutes on a laptop, bundled text
  python -m beyond_outliers.main --config=configs/scion.py:50m           # the study's 50M run
"""
from ml_collections import config_dict

from configs import base

LEARNING_RATE = {"nano": 3e-2, "0.3m": 1e-1} # best of the sweep below; other sizes take the default
DEFAULT_LEARNING_RATE = 3e-2


def get_config(arg: str = ""):
  c = base.get_config(arg)
  # Fixed rates. The tied embedding's step is signs over its fan-in as the head; a vector's step is divided by its RMS.
  c.optimizer = base.optimizer(
    "scion", groups={"embedding": {"norm": "sign", "learning_rate": 1.0}, "vector": {"norm": "rms", "learning_rate": 3e-3},
                     "scale": {"constrained": False}},       # constrained decays
    learning_rate=LEARNING_RATE.get(c.size, DEFAULT_LEARNING_RATE),
    momentum=0.9,                            # the official argument is one minus it
    norm="spectral",                         # norm whose LMO is the step: spectral | sign | col | row | rms | auto
    scale=1.0,                               # of every step; the radius of the ball when constrained
    normalized=config_dict.placeholder(bool),               # whether fan-in counts; None: as officially, for each norm
    clamp=False,                             # spectral: scales by at least 1 (for input layers)
    constrained=False,                       # decay by the learning rate itself, so that weights stay in the ball
    weight_decay=0.0,                        # decoupled
    ns_steps=5,                              # Newton-Schulz iterations
    ns_coefficients="quintic",               # quintic (as published) | polar_express
    ns_dtype="bfloat16",                     # of their operands: bfloat16 (as published) | float32
    ns_gram=False)                           # iterate on the small Gram matrix: faster for long matrices, less exact
  return base.finish(c, arg)


def get_hyper(h):
  return h.product([h.sweep("optimizer.learning_rate", [3e-3, 1e-2, 3e-2, 1e-1, 3e-1]), h.sweep("seed", range(3))])
