"""The harness around models whose every answer is known: of bytes, each with fixed chances to
follow another."""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys

import jax
import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from lm_eval.api.instance import Instance  # noqa: E402  (nothing of it where it is missing)

from beyond_outliers import config, mesh, runs, train  # noqa: E402
from beyond_outliers.data import tokenizers  # noqa: E402
from beyond_outliers.errors import ConfigError, TaskError  # noqa: E402
from beyond_outliers.evaluate import harness, harness_lm, loglikelihood, offline_tasks  # noqa: E402
from beyond_outliers.evaluate.task_suite import not_as_asked  # noqa: E402
from beyond_outliers.model import hf_config, transformer  # noqa: E402

V, CONTEXT = 258, 32
BYTES = tokenizers.load("bytes")


def bigram(log_p_VxV, V=V):
  """A model that predicts the next token from the last one alone: embeddings are unit vectors, and
  blocks add nothing."""
  c = config.Model(
    **{
      "vocab": V,
      "blocks": 1,
      "heads": 1,
      "kv_heads": 1,
      "d_head": 2,
      "d_model": V,
      "mlp_hidden": 2,
      "norm_eps": 1e-12,
      "rope_base": 1e4,
      "tied": False,
      "init_std": 0.02,
      "dtype": "float32",
      "attention": "plain",
      "unroll": 1,
      "remat": "none",
      **hf_config.FAMILIES["llama"].switches,
    }
  )
  model = transformer.Transformer(c)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), transformer.shapes(model))
  params["embedding"] = np.eye(V, dtype=np.float32)
  params["final_norm"] = jax.tree.map(
    np.ones_like, params["final_norm"]
  )  # which makes the unit vectors sqrt(V) long
  params["head"]["kernel"] = (log_p_VxV / np.sqrt(V)).astype(np.float32)
  return model, params


@pytest.fixture(scope="module")
def chances():
  """Log-probabilities [V, V] of the next byte, in float64; in the alphabet the next letter comes
  first."""
  scores_VxV = np.random.default_rng(0).normal(0, 2, (V, V))
  scores_VxV[np.arange(V - 1), np.arange(1, V)] += 12
  return scores_VxV - np.log(np.exp(scores_VxV).sum(1, keepdims=True))


@pytest.fixture(scope="module")
def harness_model(chances):
  return harness.HarnessModel(
    loglikelihood.Scorer(*bigram(chances), context=CONTEXT), BYTES, prefix=BYTES.eot
  )


def expected(chances, before, text):
  """The log-probability of `text` after the id or text `before`."""
  ids = [
    *(BYTES.encode(before).tolist() if isinstance(before, str) else [before]),
    *BYTES.encode(text).tolist(),
  ]
  start = len(ids) - len(text.encode())
  return chances[ids[start - 1 : -1], ids[start:]].sum()


def ask(method, *arguments):
  return method([Instance("loglikelihood", {}, each, 0) for each in arguments])


def test_log_likelihoods(harness_model, chances):
  long = "a long context that does not fit into the window of 32 bytes"
  asked = [
    ("on", "e"),
    ("ab", "cde"),
    ("ab", "cdd"),
    (long, " end"),
    ("spaces  ", "move"),
    ("", "empty"),
  ]
  known = [
    expected(chances, "on", "e"),
    expected(chances, "ab", "cde"),
    expected(chances, "ab", "cdd"),
    expected(chances, long, " end"),
    expected(chances, "spaces", "  move"),
    expected(chances, BYTES.eot, "empty"),
  ]
  got = ask(harness_model.loglikelihood, *asked)
  np.testing.assert_allclose([score for score, _ in got], known, rtol=1e-5)
  assert [first for _, first in got] == [False, True, False, False, False, False]


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT + 5])
def test_rolling_counts_every_token_once(harness_model, chances, length):
  text = "the quick brown fox jumps over the lazy dog; " * 3
  got = ask(harness_model.loglikelihood_rolling, (text[:length],), ("other",))
  np.testing.assert_allclose(
    got,
    [expected(chances, BYTES.eot, text[:length]), expected(chances, BYTES.eot, "other")],
    rtol=1e-5,
  )


def test_greedy_generation_ends_at_a_stop_or_at_its_limit(harness_model):
  def generate(context, **settings):
    return ask(harness_model.generate_until, (context, settings))[0]

  assert generate("xyzabc", until=["jk", "h"]) == "defg"
  assert generate("abc", until="never", max_gen_toks=5) == "defgh"
  assert generate("a" * 100 + "bc", max_gen_toks=20) == "defghijklmnopqrstuvw"
  with pytest.raises(ConfigError, match=r"generation_kwargs.max_gen_toks = 32: expected 1 to 31"):
    generate("a", max_gen_toks=CONTEXT)
  with pytest.raises(ConfigError, match="only greedy"):
    generate("a", do_sample=True)


def test_ids_without_a_token_are_never_generated(chances):
  """The padding of a vocabulary comes first here, and counts in all probabilities."""
  padded = np.full((V + 6, V + 6), -3.0)
  padded[:V, :V], padded[:, V] = chances, 50.0
  model = harness.harness_model(*bigram(padded, V + 6), BYTES, context=CONTEXT)
  assert ask(model.generate_until, ("ab", {"max_gen_toks": 5})) == ["cdefg"]
  ((score, first),) = ask(model.loglikelihood, ("ab", "c"))
  of_row = padded[ord("b")] - np.log(np.exp(padded[ord("b")]).sum())
  assert score == pytest.approx(of_row[ord("c")], rel=1e-5) and not first


def test_stops_are_texts_wherever_their_tokens_end(harness_model):
  def generate(context, **settings):
    return ask(harness_model.generate_until, (context, {"max_gen_toks": 6, **settings}))[0]

  assert generate("abc", until=["fgh", "gh"]) == "de"
  assert generate("abcd", until=["bc"]) == "efghij"  # which is of the prompt
  for until in (None, "", [], [""]):
    assert generate("abc", until=until) == "defghi"
  assert generate("", until=["never"]) != ""  # after the prefix
  for settings, told in (
    ({"until": [5]}, r"generation_kwargs.until = \[5\]: expected texts"),
    ({"max_gen_toks": 0}, r"generation_kwargs.max_gen_toks = 0: expected 1 to 31"),
    ({"max_gen_toks": "many"}, r"generation_kwargs = .*'many'"),
    ({"temperature": 0.7}, r"generation_kwargs.do_sample = True: only greedy"),
  ):
    with pytest.raises(ConfigError, match=told):
      generate("abc", **settings)


class Marking(tokenizers.Bytes):
  """Bytes of which "e" is a mark that is spelled <e>."""

  def __init__(self):
    super().__init__()
    self.special = {"<e>": ord("e")}

  def decode_bytes(self, ids):
    return super().decode_bytes(ids).replace(b"e", b"<e>")


def test_control_tokens_are_no_text_but_may_be_stops(chances):
  scorer = loglikelihood.Scorer(*bigram(chances), context=CONTEXT)
  model = harness.HarnessModel(scorer, Marking(), prefix=BYTES.eot)

  def generate(**settings):
    return ask(model.generate_until, ("ab", {"max_gen_toks": 5, **settings}))[0]

  assert generate() == "cdfg" and generate(until=["<e>"]) == "cd"


@pytest.fixture(scope="module")
def attentive():
  """(model, params): a model that looks at all that it has read, so that a token before a text
  matters."""
  sizes = dict(d_model=16, mlp_hidden=32, heads=2, kv_heads=2, d_head=8, init_std=0.5)
  model = transformer.Transformer(dataclasses.replace(bigram(np.zeros((V, V)))[0].config, **sizes))
  return model, jax.jit(lambda: transformer.init(model, 0))()


def test_contexts_begin_with_the_token_that_documents_began_with(attentive):
  model, params = attentive
  log_p = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)[0]))

  def direct(before, text):
    ids = np.array([*before, *BYTES.encode(text).tolist()])
    padded = np.asarray(log_p(np.pad(ids, (0, CONTEXT - len(ids)))[None]), np.float64)
    return padded[np.arange(len(before) - 1, len(ids) - 1), ids[len(before) :]].sum()

  class Doubling(tokenizers.Bytes):
    def encode_batch(self, texts):
      return [np.concatenate([[self.bos], ids]) for ids in super().encode_batch(texts)]

  def make(tokenizer, **options):
    scorer = loglikelihood.Scorer(model, params, context=CONTEXT)
    return harness.HarnessModel(scorer, tokenizer, **options)

  begun, plain = make(BYTES, prefix=BYTES.bos, bos=True), make(BYTES, prefix=BYTES.bos)
  context = BYTES.encode("ab").tolist()
  asked = [("ab", "cd"), ("ab ", "cd"), ("", "cd")]
  with_it = [direct([BYTES.bos, *context], text) for text in ("cd", " cd")]
  without = [direct(context, text) for text in ("cd", " cd")]
  empty = direct([BYTES.bos], "cd")
  assert np.abs(np.subtract(with_it, without)).min() > 0.01
  for asks, known in (
    (begun, with_it),
    (make(Doubling(), prefix=BYTES.bos, bos=True), with_it),
    (plain, without),
  ):
    np.testing.assert_allclose(
      [score for score, _ in ask(asks.loglikelihood, *asked[:2])], known, rtol=1e-5
    )
  for asks in (begun, plain):
    np.testing.assert_allclose(ask(asks.loglikelihood, asked[2])[0][0], empty, rtol=1e-5)
    np.testing.assert_allclose(ask(asks.loglikelihood_rolling, ("cd",)), [empty], rtol=1e-5)

  def greedy(ids, count):
    for _ in range(count):
      padded = np.asarray(log_p(np.pad(ids, (0, CONTEXT - len(ids)))[None]))
      ids = [*ids, int(np.argmax(padded[len(ids) - 1]))]
    return ids[-count:]

  for asks, ids in ((begun, [BYTES.bos, *context]), (plain, context)):
    expected_ids = harness_lm.until(greedy(ids, 6), {BYTES.bos, BYTES.eot})
    assert ask(asks.generate_until, ("ab", {"max_gen_toks": 6})) == [BYTES.decode(expected_ids)]


def test_what_is_generated_ends_where_the_next_document_begins(chances):
  """Here the token that precedes documents follows "d", and the model would go on after it."""
  log_p_VxV = chances.copy()
  log_p_VxV[ord("d"), BYTES.bos] = log_p_VxV[BYTES.bos, ord("x")] = 50.0
  harness_model = harness.HarnessModel(
    loglikelihood.Scorer(*bigram(log_p_VxV), context=CONTEXT), BYTES, prefix=BYTES.bos, bos=True
  )
  assert ask(harness_model.generate_until, ("ab", {"max_gen_toks": 8})) == ["cd"]


@pytest.fixture(scope="module")
def folder(chances, tmp_path_factory):
  """`known`: 40 multiple choices, of which the model gets 28 right; `word`: one of three words is
  its first choice."""
  path, draw = tmp_path_factory.mktemp("tasks"), np.random.default_rng(5)
  examples = []
  for number in range(40):
    words = ["".join(chr(c) for c in draw.integers(97, 123, n)) for n in (3, 5, 8, 12)]
    best = int(np.argmax([expected(chances, "answer:", " " + word) for word in words]))
    examples.append(
      {
        "context": "answer:",
        "choices": words,
        "answer": best if number % 10 < 7 else (best + 1) % 4,
      }
    )
  offline_tasks.write_task(path, "known", examples)
  offline_tasks.write_task(
    path, "word", [{"context": "x", "word": word} for word in ("!", "abc", '!"#')]
  )
  return path


def test_tasks_whose_accuracy_is_known(chances, folder):
  results = harness.score_tasks(
    *bigram(chances), BYTES, harness.load_tasks(["known", "word"], [folder]), context=CONTEXT
  )
  assert results["known"]["acc"] == pytest.approx(0.7)
  assert results["known"]["acc_stderr"] == pytest.approx(np.sqrt(0.7 * 0.3 / 39))
  examples = [json.loads(line) for line in (folder / "known.jsonl").read_text().splitlines()]
  right = [
    np.argmax([expected(chances, "answer:", " " + word) / len(word) for word in example["choices"]])
    == example["answer"]
    for example in examples
  ]
  assert results["known"]["acc_norm"] == pytest.approx(np.mean(right))
  words = [expected(chances, "x", " " + word) for word in ("!", "abc", '!"#')]
  assert results["word"]["perplexity"] == pytest.approx(np.exp(-np.mean(words)), rel=1e-4)
  assert results["word"].keys() == {"acc", "acc_stderr", "perplexity", "perplexity_stderr"}
  limited = harness.score_tasks(
    *bigram(chances), BYTES, harness.load_tasks(["known"], [folder]), context=CONTEXT, limit=7
  )
  assert limited["known"]["acc"] == 1.0


def test_tasks_that_are_loaded_once_are_asked_again(chances, folder):
  """A group is one name, whose members have rows."""
  (folder / "both.yaml").write_text("group: both\ntask: [known, word]\n")
  both, known = harness.load_tasks(["both", "known"], [folder])

  def ask(task):
    return harness.score_tasks(*bigram(chances), BYTES, [task], context=CONTEXT, limit=5)

  first = ask(both)
  assert (
    ask(both) == first
    and {"known", "word"} <= first.keys()
    and ask(known) == {"known": first["known"]}
  )


def test_the_content_of_a_task_is_what_it_asks_wherever_it_lies(folder, tmp_path):

  def content(path, name="known"):
    return harness.load_tasks([name], [path])[0].content

  examples = [json.loads(line) for line in (folder / "known.jsonl").read_text().splitlines()]
  offline_tasks.write_task(tmp_path / "copy", "known", examples)
  assert content(tmp_path / "copy") == content(folder) != content(folder, "word")
  offline_tasks.write_task(
    tmp_path / "data",
    "known",
    [*examples[:-1], {**examples[-1], "answer": 3 - examples[-1]["answer"]}],
  )
  offline_tasks.write_task(tmp_path / "prompt", "known", examples)
  (tmp_path / "prompt" / "known.yaml").open("a").write('target_delimiter: ""\n')
  assert len({content(path) for path in (folder, tmp_path / "data", tmp_path / "prompt")}) == 3


@pytest.mark.parametrize(
  "field,value,told",
  [
    ("dataset_kwargs", {"data_files": {"test": "gone.jsonl"}}, "FileNotFoundError.*gone"),
    ("doc_to_text", "{{context.a.b}}", "UndefinedError.*'a'"),
    ("test_split", "none", "none"),
  ],
)
def test_faulty_tasks_are_refused_in_one_line_when_they_are_loaded(field, value, told, tmp_path):
  offline_tasks.write_task(tmp_path, "faulty", [{"context": "x", "word": "y"}])
  file = tmp_path / "faulty.yaml"
  lines = [line for line in file.read_text().splitlines() if not line.startswith(f"{field}:")]
  file.write_text("\n".join([*lines, f"{field}: {json.dumps(value)}"]))
  with pytest.raises(ConfigError, match=rf"^tasks = faulty: .*{told}.*; fix its YAML file[^\n]*$"):
    harness.load_tasks(["faulty"], [tmp_path])


class Merging(tokenizers.Bytes):
  """Bytes, but for "qu", which is one token."""

  def encode_batch(self, texts):
    return super().encode_batch([text.replace("qu", "\x00") for text in texts])


def test_what_has_no_score_says_why(chances):
  scorer = loglikelihood.Scorer(*bigram(chances), context=CONTEXT)
  model = harness.HarnessModel(scorer, Merging(), prefix=BYTES.eot)
  merged = "a continuation has no tokens: it is empty, or merges with its context"
  asked = {
    ("on", "e"): "",
    ("", "e"): "",
    ("  ", "e"): "",  # a context of spaces alone, which are the continuation's
    ("on ", ""): "",
    ("x" * 50, "y" * CONTEXT): "",
    ("on", ""): merged,
    ("", ""): merged,
    ("q", "u"): merged,
    ("on", "y" * (CONTEXT + 1)): "a continuation has 33 tokens, the window 32",
  }
  requests = [
    Instance("loglikelihood", {}, texts, 0, metadata=("task", number, 1))
    for number, texts in enumerate(asked)
  ]
  results = model.loglikelihood(requests)
  whys = list(asked.values())
  assert [bool(np.isnan(score)) for score, _ in results] == [bool(why) for why in whys]
  assert model.left_out == {("task", n): why for n, why in enumerate(whys) if why}
  assert model.truncated == {("task", 4)}
  np.testing.assert_allclose(results[2][0], expected(chances, BYTES.eot, "  e"), rtol=1e-5)


def written(path, *examples):
  offline_tasks.write_task(path, "some", examples)
  return harness.load_tasks(["some"], [path])


def example(*choices, context="answer:", answer=0):
  return {"context": context, "choices": list(choices), "answer": answer}


def test_an_example_without_a_score_is_left_out_whole(chances, tmp_path):
  """If one of its choices is too long, it counts neither as right nor as wrong."""
  long, endless = "a" * 2 * CONTEXT, "z" * CONTEXT
  tasks = written(
    tmp_path,
    example("bcd", "cba"),
    example("bcd", endless),
    example("bcd", "cba", answer=1),
    example("bcd", "cba", context=long),
  )
  model = harness.harness_model(*bigram(chances), BYTES, context=CONTEXT)
  answers = harness.ask(model, tasks)
  counts = {"split": "test", "scored": 3, "left_out": 1, "truncated": 1}
  assert answers.scores["some"]["acc"] == pytest.approx(2 / 3)
  assert answers.scores["some"]["acc_stderr"] == pytest.approx(np.std([1, 0, 1], ddof=1) / 3**0.5)
  assert answers.examples == {"some": counts}
  reason = "a continuation has 33 tokens, the window 32"
  assert answers.left_out == [{"task": "some", "example": 1, "reason": reason}]
  assert not_as_asked(answers.examples, answers.left_out) == [
    f"some: 1 of 4 examples left out of all metrics; of example 1, {reason}",
    "some: 1 of 4 examples lost the beginning of their context, which is longer than the window",
  ]
  assert harness.ask(model, tasks, limit=1).examples["some"] == counts | {
    "scored": 1,
    "left_out": 0,
    "truncated": 0,
  }


def test_a_model_that_is_not_finite_ranks_no_choice(chances, tmp_path):
  """numpy's argmax, by which the harness ranks, takes NaN for the largest."""
  tasks = written(tmp_path, example("bcd", "!a"), example("bcd", "cba"), example("cba", "bcd"))
  model, params = bigram(chances)
  params["embedding"][ord("!"), 0] = np.nan
  answers = harness.ask(harness.harness_model(model, params, BYTES, context=CONTEXT), tasks)
  reason = "a log-likelihood is nan"
  assert answers.left_out == [{"task": "some", "example": 0, "reason": reason}]
  assert answers.scores["some"]["acc"] == 0.5 and answers.examples["some"]["scored"] == 2
  params["head"]["kernel"][:] = np.nan
  broken = harness.harness_model(model, params, BYTES, context=CONTEXT)
  with pytest.raises(
    TaskError, match=f"some: none of 3 examples has a score; for the first, {reason}"
  ):
    harness.ask(broken, tasks)
  requests = [Instance("generate_until", {}, ("ab", {"max_gen_toks": 4}), 0, ("some", 5, 1))]
  assert broken.generate_until(requests) == [""]
  assert broken.left_out["some", 5] == "the logits of a token are not finite"
  requests = [Instance("loglikelihood_rolling", {}, ("abc",), 0, ("some", 6, 1))]
  assert np.isnan(broken.loglikelihood_rolling(requests)) and broken.left_out["some", 6] == reason


@pytest.mark.parametrize(
  "broken,told",
  [
    (example("b", "c", answer=2), "answer = 2: expected the number of one of the 2 choices"),
    (example("b", "c", answer=-1), "answer = -1: expected"),
    (example("b", "c", answer=None), "answer = None: the task asks for it; expected a text"),
    (example("b", "c", context="7"), "context = 7: digits alone"),
    (example("b"), r"choices = \['b'\]: expected two or more texts"),
    (example(), "choices = .*: expected two or more texts"),
    (example("b", None), "choices = .*None.*: expected two or more texts"),
    ({"choices": ["b", "c"], "answer": 0}, "a field in a template = None: the task asks for it"),
  ],
)
def test_examples_that_would_be_asked_wrong_are_refused_by_number(broken, told, tmp_path):
  with pytest.raises(ConfigError, match=rf"tasks = some: example 1 of some: .*{told}"):
    written(tmp_path, example("b", "c"), broken, example("c", "d"))


def test_texts_that_are_read_as_times_are_refused(tmp_path):
  with pytest.raises(ConfigError, match=r"a field in a template = .*2020, 1, 2.*nor only a date"):
    written(tmp_path, *[example("b", "c", context="2020-01-02")] * 2)


def test_data_that_is_torn_is_refused_in_one_line(tmp_path):
  written(tmp_path, example("b", "c"))
  whole = (tmp_path / "some.jsonl").read_text()
  for text in (whole + '{"context": "x", "cho', whole + "[]\n", "\0", ""):
    (tmp_path / "some.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"^tasks = some: [^\n]*; fix its YAML file[^\n]*$"):
      harness.load_tasks(["some"], [tmp_path])


def test_a_name_means_one_task(folder, tmp_path):
  offline_tasks.write_task(tmp_path / "a", "known", [example("b", "c")])
  told = r"tasks = 'known': \S+known.yaml and \S+known.yaml define it; keep one"
  with pytest.raises(ConfigError, match=told):
    harness.load_tasks(["known"], [folder, tmp_path])
  (task,) = harness.load_tasks(["known", "known"], [tmp_path, tmp_path / "a"])  # one file
  assert task.name == "known"


def test_a_token_stands_before_texts_without_context(chances, folder):
  model, params = bigram(chances)

  class Without(tokenizers.Bytes):
    bos = eot = None

  with pytest.raises(ConfigError, match="prefix = None"):
    harness.score_tasks(
      model, params, Without(), harness.load_tasks(["known"], [folder]), context=CONTEXT
    )


def test_folders_that_are_not_there_are_refused():
  with pytest.raises(ConfigError, match="no such folder"):
    harness.task_manager(["known"], ["nowhere"])


@pytest.mark.slow  # reads all of the harness's task files
def test_tasks_that_nobody_knows_are_refused_before_anything_is_computed(folder, tmp_path):
  with pytest.raises(ConfigError, match="tasks = 'hellaswagg': did you mean 'hellaswag'"):
    harness.load_tasks(["known", "hellaswagg"], [folder])
  (tmp_path / "torn.yaml").write_text("task: [torn")
  offline_tasks.write_task(tmp_path, "mine", [example("b", "c")])
  with pytest.raises(ConfigError, match=r"--task_folders hold mine; \S+torn.yaml cannot be read"):
    harness.load_tasks(["torn"], [tmp_path])
  with pytest.raises(ConfigError, match=r"tasks = 'study': python -m .*offline_tasks makes it"):
    harness.load_tasks(["study"])
  known = harness.task_manager(["piqa", "hellaswag", "arc_easy", "known"], [folder]).all_tasks
  assert {"piqa", "hellaswag", "arc_easy", "known"} <= set(known)


@pytest.mark.slow
def test_the_command_on_a_run(tiny_config, tmp_path):
  """On one device, what the library finds on eight."""
  draw = random.Random(0)
  for number in range(8):
    words = draw.choices(
      ["we", "the", "people", "of", "the", "united", "states", "do", "ordain"], k=400
    )
    text = " ".join(word + "." * (draw.random() < 0.1) for word in words)
    (tmp_path / f"{number}.txt").write_text(text)
  c = tiny_config(
    **{
      "data.path": f"{tmp_path}/*.txt",
      "mesh.fsdp": 2,
      "mesh.model": 2,
      "steps": 2,
      "context": 256,
    }
  )
  assert train.run(c, tmp_path / "run", say=lambda text: None) == "done"
  command = [
    sys.executable,
    "-m",
    "beyond_outliers.evaluate",
    "--json",
    f"--workdir={tmp_path}/run",
    "--tasks=continuation,last_word",
  ]
  found = subprocess.run(
    command,
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
  )
  assert found.returncode == 0, found.stderr
  run, eight = runs.open(tmp_path / "run"), mesh.make_mesh(config.Mesh(2, 2, 2))
  tasks = harness.load_tasks(["continuation", "last_word"], [tmp_path / "run" / "eval" / "tasks"])
  results = harness.score_tasks(
    run.model, run.params(mesh=eight), run.tokenizer, tasks, context=256, mesh=eight
  )
  there = json.loads(found.stdout)["cells"][0]["tasks"]
  assert there.keys() == results.keys()
  for task, metrics in results.items():
    assert there[task] == pytest.approx(metrics, rel=1e-4)
  assert results["continuation"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
