"""Weights & Biases with the real package: offline without an account, online without a key."""

import io
import json
import os
import struct
from pathlib import Path

import train_mnist

import pytest
from conftest import run

wandb = pytest.importorskip("wandb", reason="wandb is not installed")
RUN = "--dataset synthetic --model dense --schedule constant --quiet --wandb offline"


@pytest.fixture(autouse=True)
def without_account(tmp_path, monkeypatch, few_images):
    """No W&B account is known to this process."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NETRC", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.teardown()


def trained(argv):
    return run(train_mnist, *f"{RUN} {argv}".split())


def written(directory, kind):
    """The records of a kind in W&B's offline files."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        # LevelDB's log format, after seven bytes of W&B: in blocks, records or parts of them, each
        # with a checksum, its length and its kind.
        content, parts = path.read_bytes(), b""
        for start in range(0, len(content), 32768):
            block = io.BytesIO(content[start : start + 32768])
            block.seek(0 if start else 7)
            while len(head := block.read(7)) == 7:
                length, part = struct.unpack("<4xHB", head)
                parts += block.read(length)
                if part in (1, 4):  # a whole record, or its last part
                    record, parts = Record.FromString(parts), b""
                    if record.HasField(kind):
                        found.append(getattr(record, kind))
    return found


def values(items):
    """What W&B keeps of a configuration, an epoch or a summary, by name."""
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def test_a_run_and_its_continuation_are_one_of_wandbs_with_its_config_epochs_and_results():
    """W&B shows what run.json and log.jsonl say: each epoch once, and the best one."""
    argv = "--wandb-project mine --lr 0.03 --tolerance 2 --epochs 40 --stop-after 2"
    directory, *_ = trained(argv)
    _, record, rows = run(train_mnist, "--resume", directory, "--quiet")

    # One run, which both have finished.
    first, second = written(directory, "run")
    assert first.run_id == second.run_id
    assert first.project == second.project == "mine"
    assert [end.exit_code for end in written(directory, "exit")] == [0, 0]
    config = values(first.config.update)
    assert (config["batch_size"], config["epochs"]) == (64, 40)

    # Its epochs, and its results.
    history = [values(row.item) for row in written(directory, "history")]
    assert [{name: row[name] for name in rows[0]} for row in history] == rows
    assert [row["_step"] for row in history] == [row["epoch"] for row in rows]
    summary = values(item for part in written(directory, "summary") for item in part.update)
    best = record["best"]
    assert best["epoch"] < len(rows)
    assert summary["val_loss"] == best["val_loss"]
    assert summary["val_acc"] == best["val_acc"]
    assert summary["test_acc"] == record["test"]["acc"]


def test_a_run_that_fails_is_finished_as_failed():
    """W&B does not show a run that has diverged as one that is well."""
    directory, record, _ = trained("--optimizer sgd --lr 1e30")
    assert record["status"] == "diverged"
    assert [end.exit_code for end in written(directory, "exit")] == [1]


def test_a_failure_of_wandb_is_told_and_does_not_end_the_training(monkeypatch, capfd):
    """It is told once; the run is whole without W&B."""

    def fail(*arguments, **options):
        raise ValueError("no room")

    monkeypatch.setattr(wandb.Run, "log", fail)
    _, record, rows = trained("--epochs 3")
    assert record["test"]
    assert len(rows) == 3
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "ValueError: no room" in error


@pytest.mark.parametrize("key", ["", "abc"])
def test_online_without_a_valid_key_is_one_line_before_any_training(monkeypatch, capfd, key):
    """Nobody trains for hours to hear that W&B takes nothing."""
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(SystemExit, match="2"):
        trained("--wandb online")
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "WANDB_API_KEY" in error
    assert not Path("runs").exists()
