"""Hypothesis on whatever reads text: flags, the files of a run, searches and their files."""

import contextlib
import json
from pathlib import Path

import records
import sweep
import train_cifar

import pytest
import yaml

pytest.importorskip("hypothesis", reason="hypothesis is not installed (requirements-dev.txt)")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.developers
quietly = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

# Any values, and lists and mappings of them, as in a file of JSON or YAML.
KEYS = "parameters method metric run_cap early_terminate command program"
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
leaves = scalars | st.sampled_from(["grid", "bayes", "any.py"])
keys = st.sampled_from(KEYS.split()) | st.text(max_size=8)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
)


# ------------------------ Command lines ------------------------
def flags(recipe):
    """The flags that have an effect with a recipe."""
    names = vars(train_cifar.parse_arguments(["--recipe", recipe]))
    return ["--" + name.replace("_", "-") for name in names]


WORDS = "synthetic fast cnn cpu 1 0 0.5 -1 20,24 . -- --no-augment --help"
words = st.sampled_from(WORDS.split() + flags("default") + flags("fast"))


@quietly
@example(["--data-dir", "~no-such-user/data"])
@given(st.lists(words | st.text(max_size=6), max_size=5))
def test_any_command_line_is_understood_or_refused_in_one_line(capsys, argv):
    """No typing error ends in a traceback."""
    try:
        train_cifar.parse_arguments(argv)
    except SystemExit as error:
        lines = capsys.readouterr().err.splitlines()
        assert (error.code, len(lines)) in ((0, 0), (2, 1))


# ------------------------ The files of a run ------------------------
@quietly
@given(st.binary(max_size=100) | trees.map(lambda tree: json.dumps(tree).encode()))
def test_any_bytes_in_the_files_of_a_run_are_refused_by_name(tmp_path, content):
    """Whatever a disk has made of them, the message says which file it is."""
    for name in ("run.json", "last.pt", "log.jsonl"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(records.RunError, match=r"run\.json"):
        records.read_record(tmp_path)
    with pytest.raises(records.RunError, match=r"last\.pt"):
        records.load_checkpoint(tmp_path / "last.pt")
    with contextlib.suppress(records.RunError):
        assert isinstance(records.read_log(tmp_path), list)


# ------------------------ Searches ------------------------
KINDS = "constant categorical int_uniform uniform log_uniform q_uniform beta"
numbers = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, width=32)
entries = st.fixed_dictionaries(
    {"distribution": st.sampled_from(KINDS.split())},
    optional={
        "min": numbers,
        "max": numbers,
        "q": numbers,
        "value": scalars,
        "values": st.lists(scalars, max_size=4),
    },
)
configs = trees | entries.map(lambda entry: {"parameters": {"x": entry}})
texts = configs.map(yaml.safe_dump) | st.text("-:[]{}!&*#|>?%@`\"',. \n019abe", max_size=60)
contents = texts.map(str.encode) | st.binary(max_size=200)
parameters = st.text(max_size=30) | st.from_regex(
    r"[a-z]+=(int:|log:)?[-+.0-9e,]+(\.\.)?[-+.0-9e]*",
    fullmatch=True,
)


@quietly
@given(contents, parameters)
def test_whatever_is_written_is_understood_or_refused_in_one_line(content, parameter):
    """So it is for a search's file, and for its --param."""
    Path("any.py").write_text("def main(argv): ...")
    Path("sweep.yaml").write_bytes(content)
    search = "--method random --script any.py --count 2 --dry-run --quiet"
    for argv in (["--config", "sweep.yaml"], [f"--param={parameter}"]):
        with contextlib.suppress(records.UsageError):
            sweep.main([*search.split(), *argv])
