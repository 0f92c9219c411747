"""Shampoo under quantization: QuEST's four bits for weights and activations (arXiv 2502.05003), the flagship run.

  python -m beyond_outliers.main --config=configs/shampoo_qat.py       # nano: minutes on a laptop, bundled text
  python -m beyond_outliers.main --config=configs/shampoo_qat.py:50m   # the study's 50M run
"""
from configs import base, shampoo


def get_config(arg: str = ""):
  c = shampoo.get_config(arg).unlock()           # the rates tuned in full precision, as in the study
  c.quant.recipe = "quest_w4a4"
  return base.finish(c, arg)


get_hyper = shampoo.get_hyper                    # the same rates again: which is best may change under quantization
