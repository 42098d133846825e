"""A search as it is written: whatever is typed or lies in a file, the answer is a value or one line."""

import json
import math
import random
import string

import common
import sweep
from sweep import Parameter

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MINE = (common.UsageError, common.RunError)


PARAMETERS = {
    "c1=48,96": Parameter("c1", (48, 96)), "batch-size=32": Parameter("batch_size", (32,)),
    "lr=log:1e-4..1e-1": Parameter("lr", (), 1e-4, 0.1, log=True), "d1=0.0..0.5": Parameter("d1", (), 0.0, 0.5),
    "l1=int:64..512": Parameter("l1", (), 64, 512, step=1), "augment=true,false": Parameter("augment", (True, False)),
    "optimizer=adam,sgd": Parameter("optimizer", ("adam", "sgd")), "lr=1e-4,0": Parameter("lr", (1e-4, 0)),
}  # fmt: skip


@pytest.mark.parametrize("text", PARAMETERS)
def test_a_parameter_on_the_command_line(text):
    assert sweep.parse_parameter(text) == PARAMETERS[text]


LOG_8_TO_64 = {"min": 8, "max": 64, "q": 8, "distribution": "q_log_uniform_values"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"value": "1e-4"}, Parameter("p", (1e-4,))),
        ({"values": [1, "2e-3"]}, Parameter("p", (1, 2e-3))),
        ({"min": 1, "max": 9}, Parameter("p", (), 1, 9, step=1)),
        ({"min": 0, "max": 1.5}, Parameter("p", (), 0, 1.5)),
        ({"min": "1e-4", "max": 1, "distribution": "log_uniform_values"}, Parameter("p", (), 1e-4, 1, 0, True)),
        ({"min": 0, "max": 1, "q": 0.25, "distribution": "q_uniform"}, Parameter("p", (), 0, 1, 0.25)),
        ({"min": 1, "max": 60, "q": 8, "distribution": "q_uniform"}, Parameter("p", (), 8, 56, 8)),
        (LOG_8_TO_64, Parameter("p", (), 8, 64, 8, True)),
        ({"min": -2, "max": 0, "distribution": "log_uniform"}, Parameter("p", (), math.exp(-2), 1, 0, True)),
    ],
)
def test_the_distributions_of_a_wandb_config(content, expected):
    assert sweep.parameter_from_config("p", content) == expected


def test_draws_lie_in_the_range_and_on_its_steps_and_follow_the_distribution():
    generator = random.Random(0)
    steps = Parameter("p", (), 0.0, 1.0, 0.25)
    drawn = [steps.draw(generator) for _ in range(4000)]
    assert set(drawn) == {0, 0.25, 0.5, 0.75, 1} and all(abs(drawn.count(v) - 800) < 120 for v in set(drawn))
    assert steps.grid() == (0, 0.25, 0.5, 0.75, 1)
    log = Parameter("p", (), 1e-4, 1e-1, log=True)
    drawn = [log.draw(generator) for _ in range(3000)]
    assert all(1e-4 <= value <= 1e-1 for value in drawn)
    assert abs(sum(value < 1e-3 for value in drawn) - 1000) < 110
    whole = Parameter("p", (), 3, 5, 1)
    assert {type(whole.draw(generator)) for _ in range(50)} == {int} and whole.grid() == (3, 4, 5)


CONFIG = """
program: train_cifar.py
method: random
name: from-a-file
metric: {name: val_acc, goal: maximize}
run_cap: 4
command: ["${env}", "${interpreter}", "${program}", "--epochs", 3, "${args}"]
parameters:
  lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-1}
  model: {value: confignet}
  width:
    parameters:
      c1: {values: [24, 48]}
      c2: {min: 48, max: 96}
"""


def test_a_file_in_wandbs_schema_works_unchanged(tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(CONFIG)
    sweep.main(["--config", str(path), "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    for line in printed:
        assert all(text in line for text in ("train_cifar.py --epochs 3 --lr=", "--model=confignet --c1=", "--c2="))
    search = sweep.search_from(sweep.build_parser().parse_args(["--config", str(path)]), [])
    assert (search.metric, search.sign, search.count, search.script) == ("val_acc", -1, 4, "train_cifar.py")


WRONG_CONFIGS = {
    ("method: random", "method: anneal"): "anneal is not supported",
    ("run_cap: 4", "run_cups: 4"): "unknown key run_cups", ("run_cap: 4", "run_cap: 0"): "at least 1",
    ("program: train_cifar.py", "program: gone.py"): "gone.py: there is no such Python file",
    ("log_uniform_values", "inv_log_uniform"): "the distribution inv_log_uniform is not supported",
    ("{value: confignet}", "{distribution: normal, mu: 0, sigma: 1}"): "the distribution normal",
    ("name: val_acc", "name: f1"): "metric f1 is unknown", ("goal: maximize", "goal: minimize"): "the goal is to max",
    ("{name: val_acc, goal: maximize}", "{goal: maximize}"): "a name and a goal", ("min: 48", "min: 480"): "not below",
    ("${env}", "${args_json}"): "args_json} is not supported", ("c1:", "lr:"): "lr is there twice",
    ("[24, 48]", "[]"): "values must be a list", ("values: [24, 48]", "value: [24"): "--config",
    ("c1:", "seed:"): "--seed is set by the sweep", ("--epochs", "--run-name"): "--run-name is set by the sweep",
    ("run_cap: 4", "early_terminate: {type: median}"): "the only type is hyperband",
    ("run_cap: 4", "early_terminate: {type: hyperband}"): "min_iter, or max_iter with s",
    ("run_cap: 4", "early_terminate: {type: hyperband, min_iter: 0}"): "must be a whole number above 0",
    ("run_cap: 4", "early_terminate: {type: hyperband, min_iter: 1, strict: 1}"): "strict is not supported",
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG_CONFIGS)
def test_a_config_that_is_wrong_is_refused_in_one_line(tmp_path, change):
    path = tmp_path / "sweep.yaml"
    assert change[0] in CONFIG
    path.write_text(CONFIG.replace(*change))
    with pytest.raises(common.UsageError, match=WRONG_CONFIGS[change]):
        sweep.main(["--config", str(path), "--runs-dir", "runs"])
    assert not (tmp_path / "runs").exists()


WRONG_SEARCHES = {
    "": "--method", "--method grid --param lr=0.1..0.2": "needs a list of values",
    "--method random --param c1": "NAME=VALUE", "--method random --param =3": "NAME=VALUE",
    "--method random --param c1=48,48": "48 is there twice", "--method random --param c1=48,": "a value is empty",
    "--method random --param lr=0.1..0.01": "not below", "--method random --param lr=log:0..1": "above 0",
    "--method random --param lr=log:1,2": "LOW..HIGH", "--method random --param l1=int:1.5..3": "whole numbers",
    "--method random --param lr=a..b": "two numbers", "--method random --param lr=1..2..3": "two numbers",
    "--method random --param lr=nan..1": "finite", "--method bayes --prune": "go with grid and random",
    "--method random --param label_smoothing=0.0..0.2": "choose by --metric val_acc",
    "--method grid --script train_mnist.py": "needs its own search", "--method grid --rungs 2": "--rungs needs --prune",
    "--resume nowhere": "--resume nowhere: no sweep.json", "--method grid --prune --seeds 2": "pruning and --seeds",
    "--method grid --retry-failed --name new": "needs a sweep that exists",
    "--method grid --prune --rungs 10": "no rung between 0 and 10 epochs",
    "--method grid --prune --param epochs=5,10": "the same for all trials",
    "--method grid --script notes.txt --param c1=1": "no such Python file",
    "--method grid --storage j": "--storage needs --name", "--method grid --grace 20": "--grace means nothing",
    "--method grid --storage no/j --name s": "there is no directory no",
    "--method grid --storage nothing://u:secret@h/d --name s": r"Can't load plugin((?!secret).)*$",
    "--method grid --storage j --name s --prune": "--storage and --prune do not go together",
    "--method grid --storage j --engine wandb": "--storage and --engine wandb",
}  # fmt: skip


@pytest.mark.parametrize("argv", WRONG_SEARCHES)
def test_a_search_that_is_wrong_is_refused(argv, tmp_path):
    with pytest.raises(common.UsageError, match=WRONG_SEARCHES[argv]):
        sweep.main([*argv.split(), "--runs-dir", "runs"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("search", ["grid c9=1,2", "grid c1=48,-3", "random d1=0.5..2", "bayes d1=0.5..2"])
def test_what_the_script_would_refuse_is_refused_before_the_first_trial(search, tmp_path, capsys):
    method, parameter = search.split()
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["--method", method, "--param", parameter, "--script", "train_cifar.py", "--runs-dir", "runs"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"--{parameter[:2]}" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
numbers = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False, width=32)


def quietly(examples=200):
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=slow, derandomize=True)


def check_draw(read, *arguments):
    """What is drawn from a parameter that is not refused lies in its range."""
    try:
        parameter = read(*arguments)
    except MINE as error:
        assert str(error)
    else:
        drawn = parameter.draw(random.Random(0))
        assert drawn in parameter.values if parameter.values else parameter.low <= drawn <= parameter.high


@quietly(500)
@given(st.text(max_size=30) | st.from_regex(r"[a-z]+=(int:|log:)?[-+.0-9e,]+(\.\.)?[-+.0-9e]*", fullmatch=True))
def test_any_parameter_of_the_command_line(text):
    check_draw(sweep.parse_parameter, text)


@pytest.mark.parametrize("text", [f"x=int:1..{'9' * 400}", f"x=1..{'9' * 400}", f"x={'9' * 5000}", "x=log:1e-320..1"])
def test_numbers_without_measure(text):
    check_draw(sweep.parse_parameter, text)


DISTRIBUTIONS = st.sampled_from([*sweep.DISTRIBUTIONS, "beta", None])
entries = st.fixed_dictionaries(
    {},
    optional={"min": numbers, "max": numbers, "q": numbers, "distribution": DISTRIBUTIONS, "value": scalars,
              "values": st.lists(scalars, max_size=4)},
)  # fmt: skip


@quietly(500)
@given(entries | trees)
def test_any_parameter_of_a_config(content):
    check_draw(sweep.parameter_from_config, "x", content)


configs = st.fixed_dictionaries(
    {"parameters": st.dictionaries(st.text(string.ascii_letters + "_-", min_size=1), entries, max_size=3) | trees},
    optional={"method": st.sampled_from(["grid", "bayes", "random", "sobol"]) | scalars, "metric": trees,
              "early_terminate": trees, "run_cap": scalars, "name": scalars, "command": trees, "program": scalars},
)  # fmt: skip
as_yaml = (configs | trees).map(yaml.safe_dump) | st.text("-:[]{}!&*#|>?%@`\"',. \n0123456789abeinotux_", max_size=60)


@quietly(400)
@given(as_yaml.map(str.encode) | st.binary(max_size=200))
def test_any_config_file(tmp_path, content):
    path = tmp_path / "sweep.yaml"
    path.write_bytes(content)
    try:
        assert sweep.read_config(path)["space"]
    except MINE as error:
        assert str(error)


@pytest.mark.parametrize("text", ["2001-99-99", "!!bool x", "!!timestamp x", "0x_", "[" * 5000, "a: &a [*a]"])
def test_what_yaml_itself_stumbles_over(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(MINE):
        sweep.read_config(tmp_path / "sweep.yaml")


SPACE = [Parameter("lr", (0.1, 0.2))]
SEARCH = sweep.as_json(
    sweep.Search("train_mnist.py", "grid", SPACE, [], "val_loss", 2, 1, 1, False, 3, [], [], 1, None)
)  # fmt: skip
TRIAL = dict.fromkeys(sweep.TRIAL_KEYS, None) | {"trial": 0, "params": {"lr": 0.1}, "status": "finished", "metric": 1.0}


@st.composite
def damaged(draw, valid):
    """JSON of a valid object with one key missing, or with another value for it."""
    key = draw(st.sampled_from(sorted(valid)))
    rest = {name: value for name, value in valid.items() if name != key}
    return json.dumps(rest if draw(st.booleans()) else {**rest, key: draw(trees)}).encode()


anything = st.binary(max_size=100) | trees.map(lambda tree: json.dumps(tree).encode())


@quietly()
@given(anything, damaged(SEARCH), st.lists(damaged(TRIAL) | anything, max_size=4))
def test_damaged_files(tmp_path, content, search, lines):
    (tmp_path / "sweep.json").write_bytes(content)
    with pytest.raises(MINE, match=r"sweep\.json"):
        sweep.Sweep.open(tmp_path)
    (tmp_path / "sweep.json").write_bytes(search)
    (tmp_path / "trials.jsonl").write_bytes(b"\n".join(lines))
    for read, path in ((sweep.read_lines, tmp_path / "trials.jsonl"), (sweep.Sweep.open, tmp_path)):
        try:
            read(path)
        except MINE as error:
            assert "trials.jsonl" in str(error) or (path == tmp_path and "sweep.json" in str(error))
