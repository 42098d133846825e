"""Weights & Biases with the real package: offline without an account, online without a key."""

import json
import struct

import train_mnist

import pytest
from conftest import run

wandb = pytest.importorskip("wandb", reason="wandb is not installed")
RUN = [
    "--dataset",
    "synthetic",
    "--model",
    "dense",
    "--schedule",
    "constant",
    "--quiet",
    "--wandb",
    "offline",
]


@pytest.fixture(autouse=True)
def without_account(tmp_path, monkeypatch, few_images):
    """No W&B account is known to this process."""
    for name, value in {"HOME": tmp_path, "NETRC": tmp_path / "netrc"}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.teardown()


def records(directory):
    """All records in W&B's offline files: LevelDB's log format, blocks of 32 KiB, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(
        directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns
    ):
        content, position, parts = path.read_bytes(), 7, b""
        while position + 7 <= len(content):
            if (
                32768 - position % 32768 < 7
            ):  # a block's last bytes are padding where no header fits
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", content, position)
            parts += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                yield Record.FromString(parts)
                parts = b""


def values(items):
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def test_offline_writes_config_a_row_per_epoch_and_the_best_and_test_results_also_over_a_resume(
    tmp_path,
):
    argv = [*RUN, "--wandb-project", "mine", "--lr", 0.03, "--tolerance", 2, "--epochs", 40]
    directory, _, _ = run(train_mnist, *argv, "--stop-after", 2)
    _, record, rows = run(train_mnist, "--resume", directory, "--quiet")
    written = list(records(directory))
    headers = [r.run for r in written if r.HasField("run")]
    assert {header.project for header in headers} == {"mine"} and len(
        {header.run_id for header in headers}
    ) == 1
    config = values(headers[0].config.update)
    assert config["batch_size"] == 64 and config["epochs"] == 40
    history = [values(r.history.item) for r in written if r.HasField("history")]
    assert [{name: value[name] for name in rows[0]} for value in history] == rows
    assert [value["_step"] for value in history] == [row["epoch"] for row in rows]
    summary = values(item for r in written for item in r.summary.update)
    best = min(rows, key=lambda row: row["val_loss"])
    assert best != rows[-1] and (summary["val_loss"], summary["val_acc"]) == (
        best["val_loss"],
        best["val_acc"],
    )
    assert summary["test_acc"] == record["test"]["acc"]
    assert [r.exit.exit_code for r in written if r.HasField("exit")] == [0, 0]


def test_a_run_that_fails_is_finished_as_failed(tmp_path):
    directory, record, _ = run(train_mnist, *RUN, "--optimizer", "sgd", "--lr", "1e30")
    assert record["status"] == "diverged"
    assert [r.exit.exit_code for r in records(directory) if r.HasField("exit")] == [1]


def test_a_failure_of_wandb_is_told_and_does_not_end_the_training(monkeypatch, capfd):
    def fail(*arguments, **options):
        raise ValueError("no room")

    monkeypatch.setattr(wandb.Run, "log", fail)
    _, record, rows = run(train_mnist, *RUN, "--epochs", 3)
    assert record["status"] == "finished" and len(rows) == 3 and record["test"]
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "ValueError: no room" in error


@pytest.mark.parametrize("key", [None, "abc"])
def test_online_without_a_valid_key_is_one_line_before_any_training(
    tmp_path, monkeypatch, capfd, key
):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(SystemExit, match="2"):
        run(train_mnist, *RUN, "--wandb", "online")
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "WANDB_API_KEY" in error and not (tmp_path / "runs").exists()
