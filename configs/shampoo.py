"""Distributed Shampoo with Adam's step length (arXiv 2309.06497), as in the study.

  python -m beyond_outliers.main --config=configs/shampoo.py               # nano: minutes on a laptop, bundled text
  python -m beyond_outliers.main --config=configs/shampoo.py:50m           # the study's 50M run
"""
from ml_collections import config_dict

from configs import base

LEARNING_RATE = {"nano": 1e-3, "0.3m": 3e-2} # best of the sweep below; other sizes take the default
DEFAULT_LEARNING_RATE = 3e-3


def get_config(arg: str = ""):
  c = base.get_config(arg)
  # The study's limit cuts only the vocabulary. At smaller sizes, 1024 keeps roots cheap on a CPU; it cuts nano's MLP too.
  block_size = 12288 if base.is_study(c.size) else 1024
  c.optimizer = base.optimizer(
    "shampoo",
    learning_rate=LEARNING_RATE.get(c.size, DEFAULT_LEARNING_RATE),
    b1=0.95,                                 # decay of the momentum
    b2=0.95,                                 # decay of the factors G Gᵀ
    eps=1e-10,                               # added to the factors' eigenvalues
    eps_mode="absolute",                     # absolute (Meta) | relative: times the largest eigenvalue (Google)
    weight_decay=0.0,                        # decoupled
    bias_correction=True,                    # of all averages (Meta); False: of none (Google)
    grafting="adam",                         # method that sets the step length: none | sgd | adam | rmsprop
    graft_granularity="block",               # block (Meta) | parameter (Google)
    grafting_b2=0.95,                        # decay of the grafting method's second moment
    grafting_eps=1e-10,                      # added to its root
    momentum="gradient",                     # what is averaged: gradient (Meta) | update, after preconditioning (Google)
    root="eigh",                             # row of optim.linalg.inverse_root.ROOTS: eigh | newton | denman_beavers | qr
    exponent=config_dict.placeholder(float), # power of a factor's inverse; None: 1/4 for matrices, 1/2 for vectors
    max_residual=0.1,                        # a root with a larger one is refused: the block keeps its old root
    precondition_frequency=20,               # steps between updates of a block's roots
    refresh="together",                      # together (Meta) | together_from_first (Google) | staggered: no step pays for all roots
    start_step=config_dict.placeholder(int), # first step with roots, the grafting method's before; None: precondition_frequency
    block_size=block_size,                   # longer axes ...
    long_axes="block",                       # ... are cut into blocks of that size | skip: go without a factor
    merge_dims=False,                        # treat parameters of at most block_size elements as vectors (Meta's default; not ours)
    preconditioner_dtype="float32",          # of stored factors and roots: float32 | bfloat16
    packed=False,                            # store triangles: half the memory of factors and roots, but slower
    eigenvalue_correction=False)             # Adam in the factors' eigenbasis instead of roots; needs grafting=none
  return base.finish(c, arg)


def get_hyper(h):
  return h.product([h.sweep("optimizer.learning_rate", [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]), h.sweep("seed", range(3))])
