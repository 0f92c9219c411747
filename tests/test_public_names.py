"""Public names, which users and their notebooks hold on to: imports, arguments, flags, config keys,
files of a workdir. They may be added to; one that is gone or renamed fails here."""

import dataclasses
import importlib
import inspect
import json

import commands
import jax
import pytest

from beyond_outliers import config, optim, quant, runs, train
from beyond_outliers.model import transformer
from configs import adamw

# module -> names in it.
NAMES = {
  "beyond_outliers.analysis.outliers": (
    "kurtosis max_to_mean max_to_median measure rms_kurtosis weights"
  ),
  "beyond_outliers.analysis.scaling_law": "ScalingLaw fit",
  "beyond_outliers.checkpoint": "load_quantized save_quantized",
  "beyond_outliers.config": "ConfigError SIZES resolve",
  "beyond_outliers.config.sweeps": "chainit fixed product run_name sweep zipit",
  "beyond_outliers.errors": (
    "CheckpointError ConfigError DataError Refusal TaskError WorkdirError"
  ),
  "beyond_outliers.export": "compressed_tensors",
  "beyond_outliers.model": "Transformer",
  "beyond_outliers.model.hf": "load save",
  "beyond_outliers.optim": "OPTIMIZERS SCHEDULES Axes Optimizer build",
  "beyond_outliers.quant": (
    "LayerRecipe METHODS QuantSpec QuantizedModel RECIPES Recipe dot_general_for fake_quantize "
    "load ptq quantized"
  ),
  "beyond_outliers.quant.ptq": "METHODS quantize",
  "beyond_outliers.runs": "find open",
  "beyond_outliers.train": "run",
}

# "module:name" -> arguments, or attributes of a class's instances, by name.
ARGUMENTS = {
  "beyond_outliers.analysis.scaling_law:fit": "points law shared reference embedding",
  "beyond_outliers.analysis.scaling_law:ScalingLaw.predict": "N D optimizer recipe",
  "beyond_outliers.model:Transformer.apply": "variables",
  "beyond_outliers.model:Transformer.__call__": "tokens segment_ids positions",
  "beyond_outliers.model.hf:load": "directory dtype mesh",
  "beyond_outliers.model.hf:save": "model params directory",
  "beyond_outliers.optim:build": "optimizer params num_steps axes mesh",
  "beyond_outliers.quant:dot_general_for": "recipe backend",
  "beyond_outliers.quant:fake_quantize": "x spec axis key scale",
  "beyond_outliers.quant:load": "directory",
  "beyond_outliers.quant:quantized": "model params recipe",
  "beyond_outliers.quant.ptq:quantize": "model params recipe method calibration_batches",
  "beyond_outliers.runs:Run.params": "step dtype average",
}
MEMBERS = {
  "beyond_outliers.analysis.scaling_law:ScalingLaw": (
    "identified intervals params predict reasons rho table"
  ),
  "beyond_outliers.optim:Axes": "batch fan_in fan_out",
  "beyond_outliers.optim:Optimizer": "labels schedules state_shardings tx",
  "beyond_outliers.quant:LayerRecipe": "activations backward gradients weights",
  "beyond_outliers.quant:QuantSpec": (
    "bits estimator granularity grid group rotation rounding scale"
  ),
  "beyond_outliers.quant:QuantizedModel": "method model params recipe save size_bytes",
  "beyond_outliers.quant:Recipe": "activations rules weights",
  "beyond_outliers.runs:Run": (
    "batches config manifest metrics model params status steps tokenizer"
  ),
}

HYPERPARAMETERS = {
  "adamw": "b1 b2 eps weight_decay",
  "muon": (
    "momentum nesterov ns_steps ns_coefficients ns_dtype scale nesterov_bias_correction "
    "weight_decay adam_learning_rate adam_b1 adam_b2 adam_eps"
  ),
  "psgd": (
    "momentum max_size_triangular preconditioner_lr update_probability balance_probability "
    "clip_rms noise weight_decay seed"
  ),
  "scion": "momentum norm scale constrained weight_decay",
  "shampoo": (
    "b1 b2 eps eps_mode weight_decay grafting graft_granularity grafting_b2 grafting_eps root "
    "precondition_frequency refresh start_step block_size merge_dims exponent "
    "preconditioner_dtype packed"
  ),
  "soap": ("b1 b2 shampoo_beta eps weight_decay precondition_frequency max_dim count_skipped_step"),
}

RECIPES = (
  "none rtn_w8a8 rtn_w4a4 rtn_w4a16 rtn_w3a16 rtn_w2a16 rtn_w4a16_g128 int8_w8a8 int4_w4a4 "
  "int4_w4a16 int3_w3a16 int2_w2a16 int4_w4a16_g128 quest_w1a1 quest_w2a2 "
  "quest_w3a3 quest_w4a4 quest_w8a8 quest_w1.58a1.58 quest_w4a16 lsq_w4a4 lsq_w4a4_unsigned fp8 "
  "mxfp4 nvfp4 int8_gradients"
)
METHODS = (
  "rtn rtn_mse gptq gptq_in_order gptq_mse smoothquant smoothquant+gptq awq awq+gptq hadamard "
  "hadamard_mse hadamard+gptq hadamard+gptq_mse quarot quarot+gptq"
)

# Module that `python -m` runs -> flags.
FLAGS = {
  "beyond_outliers.main": "config workdir dry_run distributed from_step",
  "beyond_outliers.prepare": "config verify",
  "beyond_outliers.evaluate": (
    "workdir hf checkpoint steps recipes methods tasks task_folders calibration data context "
    "batch_size documents follow poll out json average trust_task_code distributed"
  ),
  "beyond_outliers.evaluate.offline_tasks": "evals to",
  "beyond_outliers.analysis": (
    "root plot gap_plot common_loss degradation cells settings overrides"
  ),
  "beyond_outliers.bench": (
    "config json optimizers on_paper collectives scaling compile_for recipes ptq scoring tree only "
    "repeats peers peer_python"
  ),
  "launch.local": (
    "config root where overrides evaluate evaluate_flags report dry_run list restarts parallel "
    "processes devices"
  ),
  "launch.gke": (
    "config root where overrides evaluate evaluate_flags report dry_run image accelerator slices "
    "hosts evaluate_accelerator restarts spot namespace service_account queue claim"
  ),
  "launch.tpu": (
    "config root where overrides evaluate evaluate_flags report dry_run image accelerator slices "
    "zone project spot service_account name restarts steps"
  ),
  "launch.xm_launch": (
    "config root where overrides evaluate evaluate_flags report dry_run image executor parallel "
    "requirements"
  ),
  "launch.slurm": (
    "config root where overrides evaluate evaluate_flags report dry_run nodes tasks_per_node "
    "gpus_per_task parallel lead restarts environment container sbatch evaluate_sbatch"
  ),
}

CONFIG_KEYS = (
  "size seed steps batch_size micro_batches context tokens_per_parameter max_skipped_updates "
  "warm_start mesh.data mesh.fsdp mesh.model mesh.dcn_data data.source data.path data.field "
  "data.tokenizer data.vocab data.separator data.validation data.mask_documents data.reader "
  "data.directory data.seed "
  "model.vocab model.blocks model.heads model.kv_heads model.d_head model.d_model "
  "model.mlp_hidden model.mlp model.norm_placement model.norm_gain model.qk_norm "
  "model.attention_scale model.rope_layout model.rope_base model.tied model.dtype "
  "model.attention quant.recipe quant.backend quant.rules.head.paths quant.rules.head.recipe "
  "schedule.name schedule.warmup schedule.cooldown checkpoint.every checkpoint.keep "
  "checkpoint.verify average.decay "
  "average.last spikes.sigmas spikes.window max_gradient_norm eval.every "
  "eval.documents log.every log.tensorboard log.wandb optimizer.name optimizer.learning_rate "
  "optimizer.groups.embedding.paths optimizer.groups.vector.paths optimizer.groups.hidden.paths "
  "optimizer.groups.hidden.name optimizer.groups.hidden.learning_rate"
)

# A run of two steps leaves these; those of metrics.jsonl in any of its rows.
WORKDIR = (
  "config.json manifest.json status.json metrics.jsonl checkpoints/2/state checkpoints/2/data "
  "checkpoints/2/clock checkpoints/2/sha256.json"
)
STATUS = "status step reason"
MANIFEST = "command git packages devices data"
METRICS = (
  "step train/loss eval/loss eval/bits_per_byte lr/embedding lr/vector lr/hidden tokens "
  "tokens_per_second peak_share skipped seconds"
)


def found(place):
  """The thing at "module:dotted.name"."""
  module, _, path = place.partition(":")
  thing = importlib.import_module(module)
  for name in path.split("."):
    thing = getattr(thing, name)
  return thing


@pytest.mark.parametrize("module", NAMES)
def test_names_can_be_imported(module):
  namespace = importlib.import_module(module)
  for name in NAMES[module].split():
    assert hasattr(namespace, name), f"{module}.{name} is gone"


@pytest.mark.parametrize("place", ARGUMENTS)
def test_arguments_keep_their_names(place):
  parameters = inspect.signature(found(place)).parameters
  # What is written in shape letters, tokens_BxL, is given by position.
  names = {name.partition("_B")[0] for name in parameters}
  for name in ARGUMENTS[place].split():
    assert name in names, f"{place} takes no {name}, but {sorted(names)}"


@pytest.mark.parametrize("place", MEMBERS)
def test_members_keep_their_names(place):
  kind = found(place)
  fields = (
    {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
  )
  for name in MEMBERS[place].split():
    assert name in fields or hasattr(kind, name), f"{place} has no {name}"


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_optimizers_keep_their_arguments(name):
  """A learning rate, and all else by keyword."""
  first, *rest = inspect.signature(optim.OPTIMIZERS[name]).parameters.values()
  assert first.name == "learning_rate"
  assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in rest)
  missing = {*HYPERPARAMETERS[name].split(), "axes", "mesh"} - {
    parameter.name for parameter in rest
  }
  assert not missing, f"optim.{name} takes no {sorted(missing)}"


def test_recipes_and_methods_keep_their_names():
  """They stand in config files, in names of eval/ files and in saved models."""
  assert not set(RECIPES.split()) - set(quant.RECIPES)
  assert not set(METHODS.split()) - set(quant.METHODS)


def test_commands_keep_their_flags():
  modules = [
    f"{name}.__main__" if name.split(".")[-1] in ("evaluate", "analysis", "bench") else name
    for name in FLAGS
  ]
  known = commands.flags_of(modules)
  for (command, flags), module in zip(FLAGS.items(), modules, strict=True):
    missing = set(flags.split()) - known[module]
    assert not missing, f"python -m {command} has no flags {sorted(missing)}"


def test_config_keys_stay():
  known = config.flatten(config.to_dict(config.resolve(adamw.get_config())))
  missing = [key for key in CONFIG_KEYS.split() if key not in known]
  assert not missing, f"a config has no keys {missing}"


def test_config_files_take_a_size_and_overrides():
  c = config.resolve(adamw.get_config("50m,steps=60,quant.recipe=rtn_w8a8"))
  assert (c.size, c.steps, c.quant.recipe) == ("50m", 60, "rtn_w8a8")


def test_the_model_s_class_is_where_saved_models_look_for_it():
  kind = transformer.Transformer
  assert f"{kind.__module__}.{kind.__qualname__}" == "beyond_outliers.model.transformer.Transformer"


def test_a_run_leaves_its_files(tiny_config, tmp_path):
  """And runs.open reads them."""
  workdir = tmp_path / "run"
  assert (
    train.run(tiny_config(steps=2), workdir, say=lambda text: None, devices=jax.devices()[:1])
    == "done"
  )
  for name in WORKDIR.split():
    assert (workdir / name).exists(), f"a workdir has no {name}"
  for name, keys in (("status.json", STATUS), ("manifest.json", MANIFEST)):
    assert set(keys.split()) <= json.loads((workdir / name).read_text()).keys(), name
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  missing = set(METRICS.split()) - {key for row in rows for key in row}
  assert not missing, f"metrics.jsonl has no {sorted(missing)}"
  run = runs.open(workdir)
  assert run.steps[-1] == 2 and run.status["status"] == "done"
  assert [found.path for found in runs.find(tmp_path)] == [run.path]
