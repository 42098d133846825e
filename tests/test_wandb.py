"""Weights & Biases with the real package: offline without an account, online without a key."""

import json
import struct

import pytest
from conftest import only_run

import train_mnist

pytest.importorskip("wandb", reason="wandb is not installed")
RUN = ("--dataset", "synthetic", "--limit-train", "300", "--epochs", "2", "--model", "dense", "--quiet")


@pytest.fixture
def anonymous(tmp_path):
    """An environment without any W&B account."""
    return {"HOME": str(tmp_path), "WANDB_API_KEY": None, "NETRC": str(tmp_path / "netrc"), "WANDB_MODE": None}


def records(directory):
    """All records in W&B's offline file: LevelDB's log format, blocks of 32 KiB, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # a block's last bytes are padding where no header fits
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


@pytest.fixture
def without_account(tmp_path, monkeypatch, anonymous):
    """This process in an empty directory, without any W&B account."""
    monkeypatch.chdir(tmp_path)
    for name, value in anonymous.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)


def test_offline_writes_config_a_line_per_epoch_summary_and_the_end(tmp_path, without_account):
    train_mnist.main([*RUN, "--wandb", "offline", "--wandb-project", "mine"])
    directory, record, rows = only_run(tmp_path)
    written = list(records(directory))
    (header,) = (r.run for r in written if r.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in header.config.update}
    assert header.project == "mine" and config["batch_size"] == 64 and config["epochs"] == 2
    history = [r.history for r in written if r.HasField("history")]
    values = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in h.item} for h in history]
    assert [value["val_loss"] for value in values] == [row["val_loss"] for row in rows]
    summary = {item.key or item.nested_key[0]: item.value_json for r in written for item in r.summary.update}
    assert json.loads(summary["test_acc"]) == record["test"]["acc"] and "best_val_loss" in summary
    assert [r.exit.exit_code for r in written if r.HasField("exit")] == [0]


def test_a_run_that_fails_is_finished_as_failed(tmp_path, without_account):
    train_mnist.main([*RUN, "--wandb", "offline", "--optimizer", "sgd", "--lr", "1e30"])
    directory, record, _ = only_run(tmp_path)
    assert record["status"] == "diverged"
    assert [r.exit.exit_code for r in records(directory) if r.HasField("exit")] == [1]


@pytest.mark.parametrize("key", [None, "abc"])
def test_online_without_a_valid_key_is_one_line_before_any_training(cli, tmp_path, anonymous, key):
    done = cli("train_mnist.py", *RUN, "--wandb", "online", env={**anonymous, "WANDB_API_KEY": key})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "WANDB_API_KEY" in done.stderr
    assert not list(tmp_path.rglob("run.json"))
