"""Scion under quantization: QuEST's four bits for weights and activations (arXiv 2502.05003).

  python -m beyond_outliers.main --config=configs/scion_qat.py         # nano: minutes on a laptop, bundled text
  python -m beyond_outliers.main --config=configs/scion_qat.py:50m     # the study's 50M run
"""
from configs import base, scion


def get_config(arg: str = ""):
  c = scion.get_config(arg).unlock()           # the rates tuned in full precision, as in the study
  c.quant.recipe = "quest_w4a4"
  return base.finish(c, arg)


get_hyper = scion.get_hyper                    # the same rates again: which is best may change under quantization
