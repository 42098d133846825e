"""Hypothesis on whatever reads text: flags, the files of a run, search spaces and configurations."""

import argparse
import contextlib
import io
import json
import re
import string
from pathlib import Path

import records
import sweep
import train_cifar

import pytest
import yaml

pytest.importorskip("hypothesis", reason="hypothesis is not installed (requirements-dev.txt)")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

words = st.sampled_from(
    ["synthetic", "fast", "cnn", "cpu", "1", "0", "0.5", "-1", "20,24", ".", "--"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner)
)
pytestmark = pytest.mark.developers
quietly = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def flags():
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        train_cifar.main(["--help"])
    return sorted(set(re.findall(r"--[a-z0-9-]+", text.getvalue())))


@quietly
@example(["--data-dir", "~no-such-user/data"])
@given(
    st.lists(
        st.sampled_from(flags()) | words | st.text(max_size=6) | st.integers().map(str), max_size=5
    )
)
def test_any_command_line_is_understood_or_refused_in_one_line(capsys, argv):
    try:
        assert isinstance(train_cifar.parse_arguments(argv), argparse.Namespace)
    except SystemExit as error:
        assert error.code in (0, 2) and (
            error.code == 0 or len(capsys.readouterr().err.splitlines()) == 1
        )


@quietly
@given(st.binary(max_size=100) | trees.map(lambda tree: json.dumps(tree).encode()))
def test_any_bytes_in_the_files_of_a_run_are_refused_by_name(tmp_path, content):
    for name in ("run.json", "last.pt", "log.jsonl"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(records.RunError, match=r"run\.json"):
        records.read_record(tmp_path)
    with pytest.raises(records.RunError, match=r"last\.pt"):
        records.load_checkpoint(tmp_path / "last.pt")
    with contextlib.suppress(records.RunError):
        assert isinstance(records.read_log(tmp_path), list)


numbers = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False, width=32)
kinds = st.sampled_from(
    [
        *("constant", "categorical", "int_uniform", "uniform", "log_uniform"),
        *("log_uniform_values", "q_uniform", "q_log_uniform_values", "beta"),
    ]
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "min": numbers,
        "max": numbers,
        "q": numbers,
        "distribution": kinds,
        "value": scalars,
        "values": st.lists(scalars, max_size=4),
    },
)
configs = st.fixed_dictionaries(
    {
        "parameters": st.dictionaries(
            st.text(string.ascii_letters, min_size=1), entries | trees, max_size=2
        )
        | trees
    },
    optional={
        "method": st.sampled_from(["grid", "bayes", "random"]) | scalars,
        "metric": trees,
        "run_cap": scalars,
        "early_terminate": trees,
        "name": scalars,
        "command": trees,
        "program": st.just("any.py") | scalars,
    },
)
as_yaml = (configs | trees).map(yaml.safe_dump) | st.text(
    "-:[]{}!&*#|>?%@`\"',. \n0123456789abeinotux_", max_size=60
)
parameters = st.text(max_size=30) | st.from_regex(
    r"[a-z]+=(int:|log:)?[-+.0-9e,]+(\.\.)?[-+.0-9e]*", fullmatch=True
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(as_yaml.map(str.encode) | st.binary(max_size=200), parameters, kinds, entries)
def test_whatever_is_written_is_understood_or_refused_in_one_line(content, parameter, kind, entry):
    Path("any.py").write_text("def main(argv): ...")
    Path("sweep.yaml").write_bytes(content)
    Path("entry.json").write_text(
        json.dumps({"parameters": {"x": {**entry, "distribution": kind}}})
    )
    for argv in (["--config", "sweep.yaml"], [f"--param={parameter}"], ["--config", "entry.json"]):
        with contextlib.suppress(records.UsageError):
            sweep.main(
                [
                    "--method",
                    "random",
                    "--script",
                    "any.py",
                    "--count",
                    "2",
                    "--dry-run",
                    "--quiet",
                    *argv,
                ]
            )
