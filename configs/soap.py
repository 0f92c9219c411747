"""SOAP (arXiv 2409.11321): Adam in the eigenbasis of Shampoo's factors, as in the study.

  python -m beyond_outliers.main --config=configs/soap.py               # nano: minutes on a laptop, bundled text
  python -m beyond_outliers.main --config=configs/soap.py:50m           # the study's 50M run
"""
from ml_collections import config_dict

from configs import base

LEARNING_RATE = {"nano": 3e-3, "0.3m": 1e-1} # best of the sweep below; other sizes take the default
DEFAULT_LEARNING_RATE = 3e-3


def get_config(arg: str = ""):
  c = base.get_config(arg)
  c.optimizer = base.optimizer(
    "soap",
    learning_rate=LEARNING_RATE.get(c.size, DEFAULT_LEARNING_RATE),
    b1=0.95, b2=0.95,                        # decay of Adam's moments
    shampoo_beta=config_dict.placeholder(float),            # decay of the factors; None: b2
    eps=1e-8,
    weight_decay=0.0,                        # decoupled
    precondition_frequency=10,               # steps between updates of a block's bases
    refresh="together",                      # together (as the reference) | staggered: no step pays for all bases
    max_dim=base.longest_axis(c),            # longer axes are not rotated; vectors get plain Adam
    block_size=config_dict.placeholder(int), # longer axes are cut into blocks with bases of their own; None: whole matrices
    preconditioner_dtype="float32",          # of stored factors and bases: float32 | bfloat16, half of their memory
    normalize_gradients=False,               # divide every step by its RMS
    bias_correction=True,
    count_skipped_step=True)                 # the first update only finds the bases; True (pytorch_optimizer): it counts as a step
  return base.finish(c, arg)


def get_hyper(h):
  return h.product([h.sweep("optimizer.learning_rate", [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]), h.sweep("seed", range(3))])
