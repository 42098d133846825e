"""Whatever is typed or lies in a file, the answer is a value or one line, never a traceback."""

import argparse
import json
import math
import string

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common
import sweep
import train_cifar

MINE = (common.UsageError, common.RunError)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
numbers = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False, width=32)


def quietly(examples=200):
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=slow, derandomize=True)


@quietly(500)
@given(st.text(max_size=30) | st.from_regex(r"[a-z]+=(int:|log:)?[-+.0-9e,]+(\.\.)?[-+.0-9e]*", fullmatch=True))
def test_a_parameter_of_the_command_line(text):
    try:
        parameter = sweep.parse_parameter(text)
    except MINE:
        return
    drawn = parameter.draw(sweep.random.Random(0))
    assert drawn in parameter.values if parameter.values else parameter.low <= drawn <= parameter.high


DISTRIBUTIONS = st.sampled_from([*sweep.DISTRIBUTIONS, "beta", None])
entries = st.fixed_dictionaries(
    {},
    optional={"min": numbers, "max": numbers, "q": numbers, "distribution": DISTRIBUTIONS, "value": scalars,
              "values": st.lists(scalars, max_size=4)},
)  # fmt: skip


@quietly(500)
@given(entries | trees)
def test_a_parameter_of_a_config(content):
    try:
        parameter = sweep.parameter_from_config("x", content)
    except MINE:
        return
    drawn = parameter.draw(sweep.random.Random(0))
    if not parameter.values:
        assert parameter.low <= drawn <= parameter.high and math.isfinite(drawn)


configs = st.fixed_dictionaries(
    {"parameters": st.dictionaries(st.text(string.ascii_letters + "_-", min_size=1), entries, max_size=3) | trees},
    optional={"method": st.sampled_from(["grid", "bayes", "random", "sobol"]) | scalars, "metric": trees,
              "early_terminate": trees, "run_cap": scalars, "name": scalars, "command": trees, "program": scalars},
)  # fmt: skip


@quietly()
@given(configs | trees)
def test_a_config_file(tmp_path, content):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    try:
        options = sweep.read_config(path)
    except MINE as error:
        assert str(error)
    else:
        assert options["space"]


yaml_text = st.text("-:[]{}!&*#|>?%@`\"',. \n0123456789abeinotux_", max_size=60)


@quietly(400)
@given(st.binary(max_size=200) | yaml_text.map(str.encode))
def test_anything_as_a_config_file(tmp_path, content):
    path = tmp_path / "sweep.yaml"
    path.write_bytes(content)
    with pytest.raises(MINE):
        sweep.read_config(path)


@pytest.mark.parametrize("text", ["2001-99-99", "!!bool x", "!!timestamp x", "0x_", "[" * 5000, "a: &a [*a]"])
def test_what_yaml_itself_stumbles_over(tmp_path, text):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(MINE):
        sweep.read_config(tmp_path / "sweep.yaml")


@pytest.mark.parametrize("text", [f"x=int:1..{'9' * 400}", f"x=1..{'9' * 400}", f"x={'9' * 5000}", "x=log:1e-320..1"])
def test_numbers_without_measure(text):
    try:
        sweep.parse_parameter(text).draw(sweep.random.Random(0))
    except MINE:
        return


lines = st.lists(st.binary(max_size=20) | trees.map(lambda tree: json.dumps(tree).encode()), max_size=4)


@quietly()
@given(lines.map(b"\n".join))
def test_files_of_json_lines(tmp_path, content):
    for name, read in (("trials.jsonl", sweep.read_lines), ("log.jsonl", lambda path: common.read_log(path.parent))):
        (tmp_path / name).write_bytes(content)
        try:
            assert isinstance(read(tmp_path / name), list)
        except MINE as error:
            assert name in str(error)


@quietly()
@given(st.binary(max_size=100) | trees.map(lambda tree: json.dumps(tree).encode()))
def test_run_json_sweep_json_and_checkpoints(tmp_path, content):
    for name, read in (
        ("run.json", common.read_record), ("sweep.json", sweep.Sweep.open),
        ("last.pt", lambda directory: common.load_checkpoint(directory / "last.pt")),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MINE, match=name.replace(".", r"\.")):
            read(tmp_path)


ARGS = vars(train_cifar.build_parser().parse_args([])) | {"data_dir": "data", "runs_dir": "runs"}
RUN = {
    "name": "r", "script": "train_cifar", "args": ARGS,
    "status": "finished", "started": "", "seconds": 1.0, "device": "cpu", "precision": "fp32", "parameters": 1,
    "data": {"name": "synthetic"}, "epochs": 1, "best": {"epoch": 1, "val_loss": 1.0, "val_acc": 0.5}, "test": None,
}  # fmt: skip
SPACE = [sweep.Parameter("lr", (0.1, 0.2))]
SEARCH = sweep.as_json(
    sweep.Search("train_mnist.py", "grid", SPACE, [], "val_loss", 2, 1, 1, False, 3, [], [], 1, None)
)  # fmt: skip
TRIAL = dict.fromkeys(sweep.TRIAL_KEYS, None) | {"trial": 0, "params": {"lr": 0.1}, "status": "finished", "metric": 1.0}


@st.composite
def damaged(draw, valid):
    """A valid object with one key missing, or with another value for it."""
    key = draw(st.sampled_from(sorted(valid)))
    rest = {name: value for name, value in valid.items() if name != key}
    return rest if draw(st.booleans()) else {**rest, key: draw(trees)}


@quietly()
@given(damaged(RUN), damaged(SEARCH), damaged(TRIAL))
def test_files_that_are_nearly_right(tmp_path, run, search, trial):
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "sweep.json").write_text(json.dumps(search))
    (tmp_path / "trials.jsonl").write_text(json.dumps(trial) + "\n")
    for read in (
        lambda: common.recorded_arguments(common.read_record(tmp_path)),
        lambda: sweep.Sweep.open(tmp_path), lambda: sweep.read_lines(tmp_path / "trials.jsonl"),
    ):  # fmt: skip
        try:
            read()
        except MINE as error:
            assert str(error)


FLAGS = [action.option_strings[0] for action in train_cifar.build_parser()._actions if action.option_strings]


@quietly()
@given(st.lists(st.sampled_from(FLAGS) | st.text(max_size=6) | numbers.map(str), max_size=5))
def test_command_lines(capsys, argv):
    try:
        args = common.parse_arguments(train_cifar.build_parser(), argv)
    except SystemExit as error:
        assert error.code in (0, 2)
        error_text = capsys.readouterr().err
        assert error.code == 0 or len(error_text.splitlines()) == 1
    except MINE:
        return
    else:
        assert isinstance(args, argparse.Namespace)
