"""What a search is asked for, by flags or by a file in W&B's schema. Nothing is run."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import records
import sweep

import pytest


@pytest.fixture(autouse=True)
def a_script_that_takes_everything(monkeypatch):
    Path("any.py").write_text("def main(argv, on_epoch): ...")
    monkeypatch.setattr("sys.path", [*sys.path])  # a sweep adds the place of its script
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever account this user has


def planned(text):
    """The flags of the trials that a search would run, and what else it says."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sweep.main(["--dry-run", *text.split()])
    text = out.getvalue()
    said = [line for line in text.splitlines() if ".py " not in line]
    return re.findall(r"(?<=\.py ).*", text), said


def configured(config, argv=""):
    """The same, of a file."""
    Path("sweep.yaml").write_text(config)
    return planned(f"--config sweep.yaml {argv}")


def refused(argv):
    """The one line with which a search is refused before anything is made, or run."""
    # A search that is only planned asks no database, and looks at no data.
    dry = "" if re.search("--storage|--data-dir", argv) else "--dry-run"
    refusal = pytest.raises((records.UsageError, SystemExit))
    with contextlib.redirect_stderr(io.StringIO()) as err, refusal as error:
        sweep.main(f"--runs-dir refused {dry} {argv}".split())
    text = err.getvalue().strip() or " ".join(str(error.value).split())  # as the program prints it
    assert "\n" not in text
    assert "secret" not in text
    assert not Path("refused").exists()
    return text


# ---------------- Spaces ----------------
def values(entry, count=1, method="random"):
    """Values that are drawn for a parameter with this entry in a file."""
    config = f"program: any.py\nmethod: {method}\nrun_cap: {count}\nparameters: {{x: {{{entry}}}}}"
    return [float(flags.split()[0].partition("=")[2]) for flags in configured(config)[0]]


LISTED = """
min: 0, max: 0.3, q: 0.1, distribution: q_uniform | 0 0.1 0.2 0.3
min: 1, max: 60, q: 8, distribution: q_uniform | 8 16 24 32 40 48 56
min: 3, max: 6 | 3 4 5 6
values: ['2e-3', 1] | 0.002 1
value: '1e-4' | 0.0001
"""


def test_every_distribution_draws_in_its_range_on_its_steps_and_as_it_should():
    """What can be counted is drawn to its end; the others are as even as they say."""
    for case in LISTED.strip().splitlines():
        entry, expected = case.split(" | ")
        numbers = [float(number) for number in expected.split()]
        assert values(entry, 99, "grid") == sorted(values(entry, 99)) == numbers
    for entry in (
        "min: '1e-4', max: 0.1, distribution: log_uniform_values",
        "min: -9.2103, max: -2.3026, distribution: log_uniform",
    ):
        drawn = values(entry, 300)
        assert 1e-4 <= min(drawn) <= max(drawn) <= 0.1
        assert 70 < sum(value < 1e-3 for value in drawn) < 130
    drawn = values("min: 8, max: 256, q: 8, distribution: q_log_uniform_values", 25)
    assert len({value for value in drawn if value % 8 == 0}) == 25
    assert min(drawn) == 8
    drawn = values("min: 0, max: 1.0", 300)
    assert 0 <= min(drawn) <= max(drawn) <= 1
    assert 110 < sum(value < 0.5 for value in drawn) < 190


def test_parameters_of_the_command_line():
    """Each kind of range has its values, which follow from --seed, and nothing is drawn twice."""
    argv = "--method random --script any.py --count 40 --param x=0.0..0.5 --param k=int:4..64"
    argv += " --param lr=log:1e-4..1e-1 --param flip=true,false"
    found, _ = planned(argv)
    assert len(set(found)) == 40
    assert found[:5] == planned(f"{argv} --count 5")[0]
    other, _ = planned(f"{argv} --seed 1")
    assert found[0].split()[0] != other[0].split()[0]
    for flags in found:
        x, k, lr = map(float, re.findall(r"--\w+=(\S+)", flags))
        assert 0 <= x <= 0.5
        assert k in range(4, 65)
        assert 1e-4 <= lr <= 0.1
    assert {flags.split()[3] for flags in found} == {"--flip", "--no-flip"}
    for words in ("1,2,3", "1,nan,9007199254740993"):
        small, _ = planned(f"--method random --script any.py --param k={words}")
        assert sorted(small) == [f"--k={k} --seed 42" for k in sorted(words.split(","))]


def test_the_tutorials_searches_are_the_defaults():
    trials, _ = planned("--method grid")
    assert len(trials) == 8
    assert "--c1=48 --c2=96 --l1=256" in trials[0] and "--c1=96 --c2=192 --l1=512" in trials[7]
    flags = "--epochs 10 --lr 0.001 --batch-size 512 --tolerance 3"
    assert all(flags in trial for trial in trials)
    _, said = planned("--method bayes")
    assert all(word in str(said) for word in ("20 trials", "train_mnist.py", "lr", "batch_size"))


def test_an_idle_parameter_is_left_out_and_nothing_runs_twice():
    argv = "--script train_mnist.py --param optimizer=adam,sgd --param momentum=0.8,0.9 --method"
    trials, said = planned(f"{argv} grid")
    assert sorted(planned(f"{argv} random")[0]) == sorted(trials)
    assert [trial.removesuffix(" --seed 42") for trial in trials] == [
        "--optimizer=adam",
        "--optimizer=sgd --momentum=0.8",
        "--optimizer=sgd --momentum=0.9",
    ]
    assert len(said) == 1 and "no effect" in said[0]


# ---------------- Files in W&B's schema, as people write them ----------------
CONFIG = """
program: train_cifar.py
method: random
name: from-a-file
project:
metric: {name: val_acc, goal: maximize}
run_cap: 4
command: ["${env}", uv, run, python, "${program}", "--epochs", 3, "--dataset=${envvar:KIND}etic",
          "${args}", "${args_no_hyphens}", "${args_no_boolean_flags}"]
parameters:
  learning_rate: {distribution: log_uniform_values, min: 1e-4, max: 1e-1}
  model: {value: confignet}
  width:
    parameters:
      net.c1: {values: [24, 1e2]}
      c2: {min: 48, max: 96}
"""


def test_a_file_works_unchanged_and_the_command_line_wins(monkeypatch):
    monkeypatch.setenv("KIND", "synth")
    trials, said = configured(CONFIG)
    assert len(trials) == 4 and said == ["learning_rate is read as lr"]
    for trial in trials:
        assert trial.startswith("--epochs 3 --dataset=synthetic --lr=0.")
        assert "--model=confignet --c1=" in trial and "--c2=" in trial
    assert {trial.split("--c1=")[1].split()[0] for trial in trials} == {"24", "100"}
    assert len(configured(CONFIG, "--count 2")[0]) == 2
    assert len(configured(CONFIG, "--metric val_loss")[0]) == 4  # its goal is not the file's


def test_a_place_is_kept_as_seen_from_anywhere_and_a_name_is_a_name():
    """A folder that is called as a dataset is not taken for it; one that is not there is kept."""
    Path("mnist").mkdir()
    (trial,), _ = planned("--method random --count 1 -- --dataset mnist --data-dir none")
    assert f"--data-dir={Path('none').absolute()}" in trial
    assert "--dataset=mnist " in trial


def test_a_file_of_json_may_be_indented_with_tabs():
    config = {"program": "any.py", "method": "grid", "parameters": {"x": {"value": 1}}}
    Path("sweep.json").write_text(json.dumps(config, indent="\t"))
    assert planned("--config sweep.json")[0] == ["--x=1 --seed 42"]


def test_values_and_seeds_of_a_file_in_a_folder_with_its_script():
    Path("sub").mkdir()
    Path("any.py").rename("sub/mine.py")
    for seeds, expected in (("values: [50, 60]", ["50", "60"]), ("value: 7", ["7"])):
        Path("sub/sweep.yaml").write_text(
            "sweep: {program: mine.py, method: grid, parameters: "
            f"{{x: {{values: ['dense', null]}}, y: {{values: [1.e-2]}}, seed: {{{seeds}}}}}}}"
        )
        trials, _ = planned("--config sub/sweep.yaml")
        flags = "--x=dense --y=0.01", "--y=0.01"
        assert trials == [f"{flag} --seed {seed}" for flag in flags for seed in expected]


WRONG_CONFIGS = """
method: random => method: anneal | anneal
run_cap: 4 => run_cups: 4 | unknown key run_cups
run_cap: 4 => run_cap: {run_cap: 4, b: 1, run_cap: 5} | run_cap is there twice
run_cap: 4 => run_cap: 0 | --count: expected
program: train_cifar.py => program: gone.py | no such Python file
log_uniform_values => inv_log_uniform | inv_log_uniform is not supported
log_uniform_values => log_uniform | log_uniform takes exponents
{value: confignet} => {distribution: normal, mu: 0, sigma: 1} | the distribution normal
{value: confignet} => {values: [cnn, dense], probabilities: [0.1, 0.9]} | probabilities
name: val_acc, goal: maximize => name: f1 | val_loss, val_acc
goal: maximize => goal: minimize | goal minimize
val_acc, goal: maximize => Validation_Accuracy, goal: minimize | --metric val_acc
val_acc, goal: maximize => epoch/val_accuracy, goal: minimize | --metric val_acc
val_acc, goal: maximize => best_val_acc, goal: minimize | --metric val_acc
val_acc, => val/loss, | --metric val_loss
val_acc, => eval/epoch_loss, | --metric val_loss
{name: val_acc, goal: maximize} => {goal: maximize} | a name and a goal
min: 48 => min: 480 | not below
min: 48 => mon: 48 | has min max, not
${env} => ${args_json} | args_json} is not supported
envvar:KIND => envvar:NO_SUCH | NO_SUCH
c2: => learning_rate: | there twice
[24, 1e2] => [] | values must be a list of
[24, 1e2] => [24 | sweep.yaml: it cannot be read
--epochs => --run-name | --run-name is set by the sweep
run_cap: 4 => early_terminate: {type: median} | only type is hyperband
run_cap: 4 => early_terminate: {type: hyperband} | min_iter, or max_iter with s
run_cap: 4 => early_terminate: {type: hyperband, min_iter: 0} | min_iter: 0
run_cap: 4 => early_terminate: {type: hyperband, min_iter: 1, strict: 1} | strict: 1
c2: => depth: | --depth
c2: => bs: | --bs: did you mean --batch-size?
c2: => seed: | parameter seed
c2: => 1: | --param 1
from-a-file => a/b | sweep.yaml: sweep.py: error: argument --name
"""


@pytest.mark.parametrize("case", WRONG_CONFIGS.strip().splitlines())
def test_a_file_that_is_wrong_is_refused_in_one_line(case, monkeypatch):
    monkeypatch.setenv("KIND", "synth")
    change, expected = case.split(" | ")
    old, new = change.split(" => ")
    assert old in CONFIG
    Path("sweep.yaml").write_text(CONFIG.replace(old, new))
    assert expected in refused("--config sweep.yaml")


@pytest.mark.parametrize("text", ["2001-99-99", "!!bool x", "0x_", "[" * 2000, "a: &a [*a]"])
def test_what_yaml_itself_stumbles_over(text):
    Path("sweep.yaml").write_text(text)
    assert refused("--config sweep.yaml")


# ---------------- Flags that are wrong, or that would be dropped in silence ----------------
WRONG_SEARCHES = """
--seed 1 | --method
--method grid --param lr=0.1..0.2 | needs a list of values
--method random --param c1 | NAME=VALUE
--method random --param =3 | NAME=VALUE
--method random --param c1=48,48 | 48 is there twice
--method random --param c1=48, | a value is empty
--method random --param lr=0.1..0.01 | not below
--method random --param lr=log:0..1 | above 0
--method random --param lr=log:1,2 | LOW..HIGH
--method random --param l1=int:1.5..3 | whole numbers
--method random --param lr=a..b | finite numbers
--method random --param lr=1..2..3 | numbers
--method random --param lr=1e-4...1e-1 | lr
--method random --param lr=nan..1 | finite
--method random --param lr=1e-4 --param lr=1 | there twice
--method random --param lr=1.0..1.00001 | too narrow
--method random --param lr=0.1,0.2 -- --lr 3 | --lr is searched
--method random --param augment=true,false -- --no-augment | --no-augment is searched
--method random --param label_smoothing=0.0..0.2 | --metric val_acc
--method random --param val_size=0.1,0.2 | --metric val_acc
--method grid --script train_mnist.py --param recipe=default,fast | --label-smoothing
--method random --param momentum=0.8,0.9 | momentum
--method random --param bs=32,64 | --bs: did you mean --batch-size?
--method random --metric f1 | val_loss, val_acc
--method grid --script any.py --param x=1 --metric error --goal minimize | another use
--method grid --script any.py --param x=1 --metric score | --goal
--method grid --script train_mnist.py | needs its own search
--method grid --script notes.txt --param c1=1 | no such Python file
--method grid --prune --seeds 2 | pruning and
--method grid --prune -- --epochs=2 | at least --eta 3
--method grid --prune --param epochs=5,10 | one number of epochs
--method grid --eta 2 | --eta has no effect without --prune
--method grid --seeds 50,50 | seeds that differ
--method grid --grace 20 | --grace has no effect without --storage
--method grid --param c9=1,2 | --c9
--method grid --param c1=48,-3 | --c1
--method bayes --param d1=0.5..2 | --d1
--method random -- --no-test | --no-test is set by the sweep
--method grid --storage sqlite:///x | --storage needs --name
--method grid --name s --storage nothing://u:p@secret@h/d | load plugin
--method grid --name s --storage postgresql://u:secret@cr:e/t@h:abc/d | u:***@h
--method grid --name s --storage postgresql://u:[secret@h:abc/d | u:***@h
"""


@pytest.mark.parametrize("case", WRONG_SEARCHES.strip().splitlines())
def test_a_search_that_is_wrong_is_refused_in_one_line(case):
    argv, expected = case.split(" | ")
    assert expected in refused(argv)


def test_accuracies_may_be_compared_where_losses_may_not():
    argv = "--method grid --script train_mnist.py --param recipe=default,fast --metric val_acc"
    assert len(planned(argv)[0]) == 2


def test_a_driver_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    for name in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, name, None)
    assert 'pip install "sqlalchemy>=2.1" "psycopg[binary]"' in refused(
        "--method grid --name s --storage postgresql://u:secret@h/d"
    )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def main(:", "mine.py, line 1: SyntaxError"),
        ("x = 1\ny = x.z\n", "mine.py, line 2: AttributeError"),
        ("raise SystemExit(3)", "line 1: SystemExit: 3"),
        ("def run(): ...", "no function main(argv, on_epoch=None)"),
        ("def parse_arguments(argv): raise KeyError('depth')", "parse_arguments"),
        ("def parse_arguments(argv): raise SystemExit('no such net')", "no such net"),
        ("parse_arguments = lambda argv: type('', (), {'epochs': 'many'})", "many"),
    ],
)
def test_a_script_that_cannot_be_used_is_named_in_one_line(code, expected):
    main = "\ndef main(argv, on_epoch): ...\n" * ("parse" in code)
    Path("mine.py").write_text(code + main)
    assert expected in refused("--method grid --param k=1 --script mine.py")


def test_data_that_are_missing_are_told_before_anything_is_made(monkeypatch):
    """And not by the first trial."""
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    assert "could not be downloaded" in refused("--method random -- --data-dir none")
