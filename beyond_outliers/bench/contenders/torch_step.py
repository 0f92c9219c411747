"""Contender of bench/peers.py: the study's model, QuEST, fused AdamW in torch, eager or compiled.

bfloat16 is by autocast. Imports only torch and the standard library: `--peer_python` runs it.
Legend: B batch, L length, D model width, H query heads, K key-value heads, Dh head width, F hidden
width, V vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from beyond_outliers.bench.contenders import serve

BLOCK = 128  # of the Hadamard rotation
# Range of 16 levels in units of the root mean square, with the least error on a Gaussian (arXiv
# 2502.05003), and a term that keeps it above zero.
GAUSSIAN, EPS = 2.513930578568423, 1e-8


def torch_hadamard(size: int) -> Any:
  matrix = torch.ones(1, 1)
  while len(matrix) < size:
    matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
  return matrix / size**0.5


def torch_quest(x: Any, rotation: Any) -> Any:
  """QuEST's four bits: x rotated and rounded to 16 levels between the edges; gradients pass only
  where rounding moves a value by at most half a step."""
  x = (x.unflatten(-1, (-1, BLOCK)) @ rotation.to(x.dtype)).flatten(-2).float()
  with torch.no_grad():
    edge = GAUSSIAN * x.square().mean(-1, keepdim=True).sqrt() + EPS
    gap = 2 * edge / 15
    rounded = torch.round(torch.clamp(x, -edge, edge) / gap + 0.5) * gap - gap / 2
    trusted = (rounded - x).abs() <= gap / 2
  passing = x * trusted
  return passing + (rounded - passing).detach()


class TorchLinear(torch.nn.Linear):
  def __init__(self, inputs: int, outputs: int, quantized: bool):
    super().__init__(inputs, outputs, bias=False)
    torch.nn.init.normal_(self.weight, std=0.02)
    self.quantized = quantized
    self.register_buffer("rotation", torch_hadamard(BLOCK), persistent=False)

  def forward(self, x: Any) -> Any:
    if not self.quantized:
      return torch.nn.functional.linear(x, self.weight)
    return torch.nn.functional.linear(
      torch_quest(x, self.rotation), torch_quest(self.weight, self.rotation)
    )


class TorchNorm(torch.nn.Module):
  def __init__(self, width: int, eps: float):
    super().__init__()
    self.gain, self.eps = torch.nn.Parameter(torch.ones(width)), eps

  def forward(self, x: Any) -> Any:
    return torch.nn.functional.rms_norm(x.float(), self.gain.shape, self.gain, self.eps)


class TorchBlock(torch.nn.Module):
  def __init__(self, m: Any, quantized: bool):
    super().__init__()
    D, F, self.Dh = m["d_model"], m["mlp_hidden"], m["d_head"]
    self.groups = m["heads"] // m["kv_heads"]
    self.q = TorchLinear(D, m["heads"] * self.Dh, quantized)
    self.k = TorchLinear(D, m["kv_heads"] * self.Dh, quantized)
    self.v = TorchLinear(D, m["kv_heads"] * self.Dh, quantized)
    self.o = TorchLinear(m["heads"] * self.Dh, D, quantized)
    self.up, self.down = TorchLinear(D, F, quantized), TorchLinear(F, D, quantized)
    self.attention_norm, self.mlp_norm = TorchNorm(D, m["norm_eps"]), TorchNorm(D, m["norm_eps"])
    self.scale = torch.nn.Parameter(torch.full((m["heads"], 1, 1), self.Dh**0.5))

  def forward(self, x: Any, cos: Any, sin: Any) -> Any:
    def heads(y: Any) -> Any:
      return y.unflatten(-1, (-1, self.Dh)).transpose(1, 2)

    def rotated(y: Any) -> Any:
      a, b = y.float().unflatten(-1, (-1, 2)).unbind(-1)
      return torch.nn.functional.normalize(
        torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), dim=-1
      )

    q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
    q, k = (rotated(q) * self.scale).to(v.dtype), rotated(k).to(v.dtype)
    k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    x = x + self.attention_norm(self.o(y.transpose(1, 2).flatten(-2)))
    return x + self.mlp_norm(self.down(torch.nn.functional.relu(self.up(x)).square()))


class TorchModel(torch.nn.Module):
  def __init__(self, m: Any, context: int, quantized: bool):
    super().__init__()
    self.embedding = torch.nn.Embedding(m["vocab"], m["d_model"])
    torch.nn.init.normal_(self.embedding.weight, std=0.02)
    self.norm = TorchNorm(m["d_model"], m["norm_eps"])
    self.blocks = torch.nn.ModuleList(TorchBlock(m, quantized) for _ in range(m["blocks"]))
    Dh = m["d_head"]
    angles = torch.arange(context)[:, None] * m["rope_base"] ** (-torch.arange(0, Dh, 2) / Dh)
    self.register_buffer("cos", angles.cos(), persistent=False)
    self.register_buffer("sin", angles.sin(), persistent=False)

  def forward(self, tokens: Any) -> Any:
    x = self.embedding(tokens[:, :-1])
    for block in self.blocks:
      x = block(x, self.cos, self.sin)
    logits = torch.nn.functional.linear(self.norm(x), self.embedding.weight)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def main(m: Any, dtype: str, recipe: str, batch_size: int, context: int, compiled: bool) -> None:
  torch.manual_seed(0)
  if hasattr(os, "sched_getaffinity"):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  model: Any = TorchModel(m, context, recipe != "none")
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
  )
  tokens = torch.randint(0, m["vocab"], (batch_size, context + 1))
  loss_of = torch.compile(model) if compiled else model

  def step() -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
      loss = loss_of(tokens)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  serve(step)


if __name__ == "__main__":
  asked = json.loads(sys.argv[1])
  main(
    asked["model"],
    asked["dtype"],
    asked["recipe"],
    asked["batch_size"],
    asked["context"],
    asked["compiled"],
  )
