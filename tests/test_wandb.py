"""Weights & Biases with the real package: offline without an account, online without a key."""

import json
import struct

import train_mnist

import pytest
from conftest import run

wandb = pytest.importorskip("wandb", reason="wandb is not installed")
RUN = "--dataset synthetic --model dense --schedule constant --quiet --wandb offline"


def trained(argv):
    return run(train_mnist, *f"{RUN} {argv}".split())


@pytest.fixture(autouse=True)
def without_account(tmp_path, monkeypatch, few_images):
    """No W&B account is known to this process."""
    for name, value in {"HOME": tmp_path, "NETRC": tmp_path / "netrc"}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.teardown()


def written(directory, kind):
    """The records of a kind in W&B's offline files: LevelDB's log format, without its padding."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    paths = directory.glob("wandb/offline-run-*/*.wandb")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        content, position, parts = path.read_bytes(), 7, b""
        while position + 7 <= len(content):
            if 32768 - position % 32768 < 7:  # no header fits into the rest of a block
                position += 32768 - position % 32768
                continue
            _, length, part = struct.unpack_from("<IHB", content, position)
            parts += content[position + 7 : position + 7 + length]
            position += 7 + length
            if part in (1, 4):  # a whole record, or its last part
                record, parts = Record.FromString(parts), b""
                if record.HasField(kind):
                    found.append(getattr(record, kind))
    return found


def values(items):
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def test_a_run_and_its_continuation_are_one_of_wandbs_with_its_config_epochs_and_results():
    directory, *_ = trained(
        "--wandb-project mine --lr 0.03 --tolerance 2 --epochs 40 --stop-after 2"
    )
    _, record, rows = run(train_mnist, "--resume", directory, "--quiet")
    headers = written(directory, "run")
    assert len(headers) == 2 and {header.project for header in headers} == {"mine"}
    assert headers[0].run_id == headers[1].run_id
    config = values(headers[0].config.update)
    assert (config["batch_size"], config["epochs"]) == (64, 40)
    history = [values(row.item) for row in written(directory, "history")]
    assert [{name: row[name] for name in rows[0]} for row in history] == rows
    assert [row["_step"] for row in history] == [row["epoch"] for row in rows]
    summary = values(item for part in written(directory, "summary") for item in part.update)
    best = min(rows, key=lambda row: row["val_loss"])
    assert best != rows[-1] and summary["val_loss"] == best["val_loss"]
    assert summary["val_acc"] == best["val_acc"] and summary["test_acc"] == record["test"]["acc"]
    assert [end.exit_code for end in written(directory, "exit")] == [0, 0]


def test_a_run_that_fails_is_finished_as_failed():
    directory, record, _ = trained("--optimizer sgd --lr 1e30")
    assert record["status"] == "diverged"
    assert [end.exit_code for end in written(directory, "exit")] == [1]


def test_a_failure_of_wandb_is_told_and_does_not_end_the_training(monkeypatch, capfd):
    def fail(*arguments, **options):
        raise ValueError("no room")

    monkeypatch.setattr(wandb.Run, "log", fail)
    _, record, rows = trained("--epochs 3")
    assert record["status"] == "finished" and len(rows) == 3 and record["test"]
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "ValueError: no room" in error


@pytest.mark.parametrize("key", ["", "abc"])
def test_online_without_a_valid_key_is_one_line_before_any_training(
    tmp_path, monkeypatch, capfd, key
):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(SystemExit, match="2"):
        trained("--wandb online")
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "WANDB_API_KEY" in error and not (tmp_path / "runs").exists()
