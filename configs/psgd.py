"""PSGD Kron with triangular factors (arXiv 2402.11858; kron_torch), as in the study.

  python -m beyond_outliers.main --config=configs/psgd.py               # nano: minutes on a laptop, bundled text
  python -m beyond_outliers.main --config=configs/psgd.py:50m           # the study's 50M run
"""
from ml_collections import config_dict

from configs import base

LEARNING_RATE = {"nano": 1e-3, "0.3m": 3e-3} # best of the sweep below; other sizes take the default
DEFAULT_LEARNING_RATE = 1e-3


def get_config(arg: str = ""):
  c = base.get_config(arg)
  c.optimizer = base.optimizer(
    "psgd",
    learning_rate=LEARNING_RATE.get(c.size, DEFAULT_LEARNING_RATE),
    momentum=0.9,                            # decay of the average that is preconditioned and that the factors learn from
    max_size_triangular=base.longest_axis(c),               # longer axes, and vectors, get a diagonal factor
    preconditioner_lr=0.1,                   # learning rate of the factors
    preconditioner_init=1.0,                 # the preconditioner starts as this multiple of the identity
    update_probability=config_dict.placeholder(float),      # updates of the factors per step; None: 1 for 500 steps, then falling to 0.03
    balance_probability=0.01,                # chance that an update brings a matrix's two factors to one size
    clip_rms=1.1,                            # largest RMS of a step before the learning rate
    clip_eps=1e-6,                           # added to that RMS: 1e-6 (pytorch_optimizer) | 1e-12 (kron_torch)
    noise="none",                            # none (pytorch_optimizer) | preconditioner (psgd_jax) | both (kron_torch)
    weight_decay=0.0,                        # decoupled, of matrices only
    cache=True,                              # keep QᵀQ between updates of Q: faster, but doubles the state of Q
    seed=0)                                  # of the probes
  return base.finish(c, arg)


def get_hyper(h):
  return h.product([h.sweep("optimizer.learning_rate", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]), h.sweep("seed", range(3))])
