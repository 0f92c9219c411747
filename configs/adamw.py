"""AdamW, the reference of every comparison.

  python -m beyond_outliers.main --config=configs/adamw.py                 # nano: about two minutes on a laptop, bundled text
  python -m beyond_outliers.main --config=configs/adamw.py:50m             # the study's 50M run
"""
from configs import base

LEARNING_RATE = {"nano": 1e-1, "0.3m": 3e-1} # best of the sweep below; other sizes take the default
DEFAULT_LEARNING_RATE = 3e-3


def get_config(arg: str = ""):
  c = base.get_config(arg)
  c.optimizer = base.optimizer("adamw", learning_rate=LEARNING_RATE.get(c.size, DEFAULT_LEARNING_RATE),
                               b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
  return base.finish(c, arg)


def get_hyper(h):
  return h.product([h.sweep("optimizer.learning_rate", [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]), h.sweep("seed", range(3))])
