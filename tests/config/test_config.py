"""Configs: every one builds at every size, survives JSON, and refuses nonsense by naming field,
value and remedy."""

import ast
import importlib
import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from beyond_outliers import config
from beyond_outliers.evaluate import target
from beyond_outliers.model import transformer
from beyond_outliers.train import program as program_lib
from configs import adamw, base

CONFIGS = pathlib.Path(base.__file__).parent
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in ("__init__", "base"))

# Parameters, embedding included: what study.md or the size's own name says, and how far off is
# still that size.
PARAMETERS = {
  "nano": (3.93e6, 0.01),
  "0.1m": (0.12e6, 0.05),
  "0.3m": (0.3e6, 0.25),
  "0.6m": (0.6e6, 0.25),
  "1m": (1e6, 0.25),
  "2m": (2e6, 0.25),
  "50m": (49.7e6, 0.002),
  "125m": (121.8e6, 0.001),
  "350m": (351.2e6, 0.001),
  "500m": (502.2e6, 0.001),
  "760m": (769.3e6, 0.001),
  "1.5b": (1489e6, 0.001),
}


def named(name: str, arg: str = "") -> config.Config:
  return config.resolve(importlib.import_module(f"configs.{name}").get_config(arg))


# Every size, and every config at the smallest and the largest.
@pytest.mark.parametrize(
  "name,size",
  [
    *((NAMES[0], size) for size in config.SIZES),
    *((name, size) for name in NAMES[1:] for size in ("nano", "1.5b")),
  ],
)
def test_every_config_and_every_size_builds_with_the_parameters_it_says(name, size):
  c = named(name, size)
  program = program_lib.build_program(c)
  expected, tolerance = PARAMETERS[size]
  count = transformer.count(program.state.params)["total"]
  assert count == pytest.approx(expected, rel=tolerance)
  if "steps" not in config.SIZES[size]:
    tokens = c.steps * c.batch_size * c.context
    assert 0 <= tokens - c.tokens_per_parameter * count < c.batch_size * c.context, (
      "not 20 tokens per parameter, rounded up"
    )
    assert c.tokens_per_parameter == 20


def test_steps_that_are_given_need_follow_nothing():
  """Nor does a record, whose steps are a number."""
  c = named("adamw", "0.1m,steps=7,model.mlp=swiglu")
  assert c.steps == 7 and config.resolve(config.to_dict(c)) == c
  assert named("adamw", "0.1m,tokens_per_parameter=40").steps == 2 * named("adamw", "0.1m").steps


@pytest.mark.parametrize(
  "name, argument, field",
  [
    ("adamw", "nano,model.dtype=float64", "model.dtype"),
    ("muon", "nano,optimizer.ns_dtype=float64", "optimizer.ns_dtype"),
    ("scion", "nano,optimizer.groups.hidden.ns_dtype=float64", "groups.hidden.ns_dtype"),
  ],
)
def test_dtypes_that_jax_would_narrow_are_refused(name, argument, field, tmp_path):
  c = named(name, argument)
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict(c)))
  for start in (lambda: program_lib.build_program(c), lambda: target.RunCheckpoints(tmp_path)):
    with pytest.raises(config.ConfigError, match=rf"{field} = 'float64': .* set JAX_ENABLE_X64=1"):
      start()
  with jax.enable_x64(True):
    program_lib.build_program(c)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", config.SIZES)
def test_a_config_read_back_from_json_is_the_same(name, size):
  c = named(name, f"{size},optimizer.groups.vector.learning_rate=0.125,data.mask_documents=true")
  back = config.resolve(json.loads(json.dumps(config.to_dict(c))))
  assert back == c
  assert c.optimizer.groups["vector"].optimizer.learning_rate == 0.125
  # The first match wins, so order matters, which == ignores.
  assert (
    list(back.optimizer.groups)
    == list(c.optimizer.groups)
    == ["embedding", "scale", "vector", "hidden"]
  )


def test_derived_values_follow_what_they_derive_from():
  c = adamw.get_config("1m")
  before = c.steps
  c.model.heads = 12
  c.data.vocab = 1024
  c.batch_size = 8
  assert (c.model.kv_heads, c.model.d_model, c.model.mlp_hidden, c.model.vocab) == (
    4,
    384,
    1536,
    1024,
  )
  assert c.eval.batch_size == 8
  count = transformer.count(program_lib.build_program(config.resolve(c)).state.params)["total"]
  assert c.steps == -(-20 * count // (8 * 256)) != before
  c.steps = 90
  assert (c.checkpoint.every, c.eval.every) == (23, 30)


def test_overrides_win_and_keep_what_they_do_not_name():
  c = named(
    "adamw",
    "2m,steps=7,model.dtype=bfloat16,optimizer.groups.hidden.learning_rate=1e-4,data.path=/tmp/a "
    "b:*.txt",
  )
  assert (c.size, c.steps, c.model.dtype, c.data.path) == ("2m", 7, "bfloat16", "/tmp/a b:*.txt")
  groups = c.optimizer.groups
  assert groups["hidden"].optimizer.learning_rate == 1e-4
  assert (
    groups["embedding"].optimizer.learning_rate
    == c.optimizer.learning_rate
    == adamw.DEFAULT_LEARNING_RATE
  )
  assert groups["hidden"].optimizer.b2 == c.optimizer.default.b2
  assert named("adamw").size == named("adamw", "steps=3").size == "nano"


# argument of the config -> what the message must hold: the field, the value, the remedy
BAD_ARGUMENTS = {
  "50q": ("size = '50q'", "0.3m", "50m"),
  "nano,3": ("config argument = '3'", "key=value"),
  "nano,modle.heads=3": ("modle", "did you mean 'model'"),
  "nano,model.hads=3": ("model.hads", "did you mean 'heads'"),
  "nano,steps.x=3": ("steps.x", "unknown key"),
  "nano,optimizer.groups.hiden.learning_rate=1": (
    "optimizer.groups.hiden",
    "did you mean 'hidden'",
  ),
  "nano,optimizer.momentum=0.9": ("optimizer.momentum", "unknown key"),  # another optimizer's
  "nano,optimizer.groups.hidden.momentum=0.9": ("optimizer.groups.hidden.momentum", "unknown key"),
  "nano,optimizer.groups.hidden.name=adam": ("'adam'", "adamw"),
  "nano,optimizer.name=adam": ("optimizer.name = 'adam'", "adamw"),
  "nano,optimizer.groups.hidden.paths=(": (
    "optimizer.groups.hidden.paths = '('",
    "regular expression",
  ),
  "nano,quant.rules.first.recpie=none": ("quant.rules.first.recpie", "did you mean 'recipe'"),
  "nano,quant.rules.first=none": ("quant.rules.first", "unknown key"),
  "nano,quant.rules.first.recipe.x=none": ("quant.rules.first.recipe.x", "unknown key"),
  "nano,model=3": ("model = 3", "expected", "int"),
  "nano,model.norm_eps=abc": ("model.norm_eps = 'abc'", "float", "str"),
  "nano,steps=1.5": ("steps = 1.5", "int", "float"),
  "nano,steps=True": ("steps = True", "int", "bool"),
  "nano,model.rope_base=True": ("model.rope_base = True", "float", "bool"),
  "nano,checkpoint.verify=1": ("checkpoint.verify = 1", "bool", "int"),
  "nano,data.path=None": ("data.path = None", "str", "NoneType"),
  "nano,micro_batches=0": ("micro_batches = 0", "at least 1"),
  "nano,micro_batches=3": ("micro_batches = 3", "batch_size (8)"),
  "nano,mesh.fsdp=0": ("mesh.fsdp = 0", "-1"),
  "nano,mesh.dcn_data=0": ("mesh.dcn_data = 0", "-1"),
  "nano,mesh.fsdp=-1": ("mesh = (-1, -1, 1)", "only one"),
  "nano,model.heads=2": ("model.kv_heads = 0", "at least 1"),
  "nano,model.heads=4,model.kv_heads=3": ("model.kv_heads = 3", "query heads (4)"),
  "nano,model.d_head=7": ("model.d_head = 7", "even"),
  "nano,model.init_std=1e999": ("model.init_std = inf", "finite"),
  "nano,size=50m": ("size = '50m'", "size after the colon"),
  "nano,seed=1,steps=2,seed=1": ("config argument = 'seed'", "is given twice"),
  "nano,tokens_per_parameter=40": ("tokens_per_parameter = 40", "steps = 260 is set"),
  "0.1m,tokens_per_parameter=40,steps=9": ("tokens_per_parameter = 40", "steps = 9 is set"),
  "0.1m,model.mlp=swiglu": ("model.mlp = 'swiglu'", "steps for 'relu2' only"),
  "nano,model.mlp=gelu": ("model.mlp = 'gelu'", "'relu2', 'swiglu'"),
  "nano,data.source=web": ("data.source = 'web'", "'sotu'"),
  "nano,data.source=text": ("data.path = ''", "glob"),
  "nano,data.tokenizer=words": ("data.tokenizer = 'words'", "'bytes'"),
  "nano,data.separator=none": ("data.separator = 'none'", "'eot', 'bos'"),
  "nano,data.validation=newest:0": ("data.validation = 'newest:0'", "'newest:COUNT'"),
  "nano,data.reader=tfds,data.readers=3": ("data.readers = 3", "batch_size (8)"),
  "nano,schedule.name=linear": ("schedule.name = 'linear'", "'trapezoidal'"),
  "nano,schedule.warmup=1.5": ("schedule.warmup = 1.5", "fraction"),
  "nano,schedule.warmup=0.5,schedule.cooldown=0.6": ("schedule.cooldown = 0.6", "warm-up (0.5)"),
  "nano,optimizer.learning_rate=-1": ("optimizer.learning_rate = -1.0", "at least 0"),
  "nano,optimizer.b1=1.0": (
    "optimizer.b1 = 1.0",
    "0 to",
  ),  # the bias correction would divide by zero
  "nano,seed=-1": ("seed = -1", "at least 0"),
  "nano,seed=4294967296": ("seed = 4294967296", "at most 4294967295"),
  "nano,data.seed=-1": ("data.seed = -1", "at least 0"),
  "nano,checkpoint.keep=0": ("checkpoint.keep = 0", "at least 1"),
  "nano,eval.every=0": ("eval.every = 0", "at least 1"),
  "nano,max_gradient_norm=-1": ("max_gradient_norm = -1.0", "at least 0"),
  "nano,max_gradient_norm=1e999": ("max_gradient_norm = inf", "finite"),
  "nano,spikes.sigmas=-6.0": ("spikes.sigmas = -6.0", "at least 0"),
  "nano,spikes.window=3": ("spikes.window = 3", "at least 4"),
  "nano,average.decay=1.0": ("average.decay = 1.0", "expected 0 (none) to below 1"),
  "nano,average.decay=-0.1": ("average.decay = -0.1", "expected 0"),
  "nano,average.decay=1e999": ("average.decay = inf", "below 1"),
  "nano,average.last=-1": ("average.last = -1", "at least 0"),
  "nano,average.last=3": (
    "average.last = 3",
    "checkpoint.keep = 2 checkpoints are kept; raise that",
  ),
  "nano,log.profile_step=1": ("log.profile_step = 1", "2 or more"),
}


@pytest.mark.parametrize("arg", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused(arg):
  with pytest.raises(config.ConfigError) as error:
    named("adamw", arg)
  for part in BAD_ARGUMENTS[arg]:
    assert part in str(error.value)


def _without(tree, *keys):
  return {key: value for key, value in tree.items() if key not in keys}


# What a config file or a config.json may hold that an argument cannot say.
BAD_TREES = {
  "a missing key": (lambda c: c | {"model": _without(c["model"], "heads")}, "model.heads: missing"),
  "a missing section": (lambda c: _without(c, "log"), "log: missing"),
  "an unknown section": (lambda c: c | {"evals": {}}, "evals: unknown key; did you mean 'eval'"),
  "a section that is a number": (
    lambda c: c | {"model": 3},
    "model = 3: expected the section Model",
  ),
  "not a section at all": (lambda c: 5, "config = 5"),
  "an optimizer without name": (
    lambda c: c | {"optimizer": _without(c["optimizer"], "name")},
    "optimizer.name = None: expected one of",
  ),
  "no groups": (
    lambda c: c | {"optimizer": c["optimizer"] | {"groups": {}}},
    "optimizer.groups = {}: expected {label",
  ),
  "a group that is a number": (
    lambda c: c | {"optimizer": c["optimizer"] | {"groups": {"hidden": 3}}},
    "optimizer.groups.hidden = 3",
  ),
  "a group without paths": (
    lambda c: c | {"optimizer": c["optimizer"] | {"groups": {"hidden": {}}}},
    "optimizer.groups.hidden.paths = None: expected str",
  ),
  "two vocabularies": (
    lambda c: c | {"model": c["model"] | {"vocab": 100}},
    "model.vocab = 100: must equal data.vocab (2048)",
  ),
  "another optimizer's key": (
    lambda c: c | {"optimizer": c["optimizer"] | {"ns_steps": 5}},
    "optimizer.ns_steps: unknown key",
  ),
}


@pytest.mark.parametrize("what", BAD_TREES)
def test_a_bad_config_is_refused(what):
  damage, message = BAD_TREES[what]
  with pytest.raises(config.ConfigError) as error:
    config.resolve(damage(config.to_dict(named("adamw"))))
  assert message in str(error.value)


def test_a_typo_in_a_config_file_is_an_error_not_a_new_knob():
  with pytest.raises(AttributeError):
    adamw.get_config("nano").model.head_count = 3


@pytest.mark.parametrize(
  "change",
  [
    "steps=300",
    "seed=1",
    "optimizer.groups.hidden.learning_rate=1e-4",
    "model.d_head=64",
    "data.seed=1",
    "warm_start=other",
    "average.decay=0.99",
    "spikes.sigmas=6.0",
    "max_gradient_norm=1.0",
  ],
)
def test_another_run_is_refused_with_the_keys_that_differ(change):
  key, _, value = change.partition("=")
  with pytest.raises(config.ConfigError) as error:
    config.check_resumable(named("adamw"), named("adamw", "nano," + change))
  assert f"\n  {key}: " in str(error.value) and f"{value} now" in str(error.value).replace(
    "'", ""
  ).replace("0.0001", "1e-4")
  assert "--workdir" in str(error.value)


def test_what_does_not_enter_the_numbers_may_change():
  changes = (
    "mesh.model=1,mesh.fsdp=8,log.every=3,log.wandb=x,checkpoint.keep=9,data.directory=/elsewhere,data.path=/moved/*,"
    "data.prefetch=1,checkpoint.every_minutes=5,model.remat=full,model.unroll=2,model.attention=plain,average.last=4,max_skipped_updates=20"
  )
  config.check_resumable(named("adamw"), named("adamw", "nano," + changes))
  assert len(config.differences(named("adamw"), named("adamw", "nano," + changes))) == 13
  for prefix in config.MAY_CHANGE:
    assert any(
      key == prefix or key.startswith(prefix + ".")
      for key in config.flatten(config.to_dict(named("adamw")))
    ), prefix


def test_importing_the_configuration_imports_no_library():
  """Commands refuse a bad config at once, and a notebook may read one without JAX."""
  heavy = {"jax", "numpy", "ml_collections", "absl"}
  code = f"import sys, beyond_outliers.config; print(sys.modules.keys() & {heavy})"
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent, check=True
  )
  assert result.stdout.strip() == "set()"


def test_the_guide_lists_every_section():
  text = (CONFIGS / "README.md").read_text().split("## Sections\n")[1].split("\n## ")[0]
  cells = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("|")]
  sections = [section for section, _ in cells[3:]]
  listed = re.findall(r"`(\w+)`", " ".join([cells[2][1], *sections]))
  assert sorted(listed) == sorted(config.to_dict(named("adamw")))


def test_every_knob_has_a_comment_on_its_line():
  path = CONFIGS / "base.py"
  lines = path.read_text().splitlines()
  bare = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
      target = ast.unparse(node.targets[0])
      section = (
        isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "config_dict.ConfigDict"
      )
      if not section and "  # " not in lines[node.lineno - 1]:
        bare.append(target)
  assert not bare, f"without a comment: {bare}"
