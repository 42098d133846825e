"""What a run leaves on the disk: atomic files, locks, checkpoints, the run directory; and W&B.

Nothing is cleaned up after a process that dies. What it has saved is whole, its lock has gone with
it, and whoever comes next goes on from there.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, do not resume one run from two processes.
    fcntl = None

HERE = Path(__file__).resolve().parent
FORMAT = 2  # of run.json and the checkpoints: raised when what is in them changes


class UsageError(Exception):
    """A request that cannot be met as it was asked: one line, exit status 2."""


class RunError(Exception):
    """A failure that the user can cause and mend, such as a full disk: one line, exit status 1."""


# ------------------------ The screen ------------------------
def say(line: str, quiet: bool = False, needed: bool = False) -> None:
    """Print a line for a person, unless `quiet`.

    An output that takes no more (`| head -1`, a full disk) does not end a run. But where the line
    is what was asked for (`needed`), a full disk is an OSError.
    """
    if quiet:
        return
    try:
        with tqdm.external_write_mode():  # no progress bar on the same line
            print(line, flush=True)
    except OSError as error:
        # Python flushes its output once more at the end, and then needs a file that is open.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if needed and not isinstance(error, BrokenPipeError):
            raise


def shown(path: Path | str) -> str:
    """A path as a person writes it: relative where it lies below the current directory."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


# ------------------------ Files ------------------------
def checksum_of(content: bytes) -> str:
    """The SHA-256 of `content`, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one. RunError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{shown(path)} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict | list) -> None:
    """Write JSON for people to read, atomically; paths become texts. RunError."""
    write_atomically(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """Write a line of JSON for each row, atomically. RunError."""
    write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def read_json(path: Path, lines: bool = False) -> Any:
    """Read a file of JSON, or of JSON `lines`. RunError where it is damaged."""
    try:
        text = path.read_text()
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{shown(path)} is damaged: {error}") from error


def save_checkpoint(path: Path, state: dict) -> str:
    """Save tensors and plain values, atomically, to be read with `load_checkpoint`. Returns the
    SHA-256 of the file. RunError."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())
    return checksum_of(buffer.getvalue())


def load_checkpoint(path: Path, sha256: str | None = None) -> dict:
    """What `save_checkpoint` wrote, on the CPU, without running code from it. RunError, also where
    the file has another `sha256`.

    torch does not check what it loads. But a checkpoint is a zip file, and that has a checksum of
    each of its parts.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(
            f"{shown(path)} is missing: the run has not got so far, or the file was removed"
        ) from None
    except Exception as error:  # zipfile and torch.load raise whatever they stumble over
        raise RunError(
            f"{shown(path)} is damaged, or is not a checkpoint ({type(error).__name__})"
        ) from error
    if damaged:
        raise RunError(f"{shown(path)} is damaged: the checksum of {damaged} is not right")
    check_format(path, state)
    if sha256 and checksum_of(path.read_bytes()) != sha256:
        raise RunError(f"{shown(path)} is not that of this run")
    if "frozen" in state:  # the weights that a run has not changed lie beside those that it has
        frozen = load_checkpoint(path.with_name("frozen.pt"), state["frozen"])
        state["weights"] = frozen["weights"] | state["weights"]
    return state


def check_format(path, content):
    """RunError where the `content` of a file is not of this version."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"{shown(path)} is not of this version of the scripts")


# ------------------------ Locks and signals ------------------------
@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; it ends with the process at the latest.

    RunError where another process holds it, unless `wait`.
    """
    with open(path, "a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise RunError(f"{shown(path.parent)} is in use by another process") from None
        yield


def is_locked(path):
    """Whether another process holds the lock on the file `path`."""
    if not path.exists():
        return False
    try:
        with locked(path):
            return False
    except RunError:
        return True


def interrupt(number, frame):
    """A handler of signals: SIGTERM is to a training what Ctrl-C is."""
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt."""
    # Python lets only the main thread set handlers. In another one, whoever started it stops it.
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


# ------------------------ The run directory ------------------------
# What run.json has to have, and its part `data`.
RECORD = {"name", "script", "args", "status", "error", "started", "seconds", "seed", "precision"}
RECORD |= {"threads", "data", "parameters", "epochs", "best", "test"}
DATA = {"name", "selection", "train", "val", "checksum"}
# The arguments that it leaves out.
NOT_RECORDED = {"script", "argv", "typed", "directory", "listing", "resume", "quiet", "stop_after"}


def read_record(directory: Path) -> dict:
    """run.json of a run directory. UsageError where there is none, RunError where it is not one of
    this version."""
    path = directory / "run.json"
    if not path.is_file():
        raise UsageError(f"{shown(directory)} is not a run directory: there is no run.json")
    record = read_json(path)
    check_format(path, record)
    lacking = RECORD - record.keys() or DATA.difference(record["data"] or ())
    if lacking:
        raise RunError(f"{shown(path)} is damaged: it has no {', '.join(sorted(lacking))}")
    return record


def read_log(directory: Path) -> list[dict]:
    """The rows of log.jsonl. RunError, OSError."""
    return read_json(directory / "log.jsonl", lines=True)


def utc_now():
    """The time, as in 2026-01-31T23:59:59Z."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def environment(args):
    """Where a run is computed: the part of run.json that a continuation writes anew."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        git = done.stdout.strip() or None  # None: no checkout
    except OSError:  # no git
        git = None
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    return {
        "device": args.device,
        "precision": args.precision,
        "threads": args.threads,
        "versions": {"python": sys.version.split()[0], **packages},
        "host": socket.gethostname(),
        "git": git,
    }


def already_done(args: Namespace) -> dict | None:
    """The result of a run that has nothing left to do; None where there is something.

    It is known from run.json and the flags, before any data are loaded. UsageError where the name
    of a new run is taken, RunError where the run cannot go on.
    """
    directory = args.directory
    if not args.resume:
        # A process that was killed while it began has left a lock, and perhaps these files.
        names = {path.name for path in directory.glob("*")}
        begun = {"data.csv", "frozen.pt"} if ".lock" in names else set()
        if any(name[0] != "." for name in names - begun):
            raise UsageError(f"--run-name {args.run_name}: {shown(directory)} exists already")
        return None
    record = read_record(directory)
    if record["status"] == "diverged":
        raise RunError(
            f"{shown(directory)}: {record['error']}, and would again; start anew with a lower --lr"
        )

    # A lost best.pt is to be made again.
    status = record["status"]
    finished = status == "finished" and record["epochs"] >= last_epoch(args)
    stopped = status == "stopped_early" and not asks_for_more(args, record)
    if not (finished or stopped) or not (directory / "best.pt").exists():
        return None
    say(
        f"{shown(directory)}: {status.replace('_', ' ')} after {record['epochs']} epochs, "
        "nothing to do",
        args.quiet,
    )
    return record | {"directory": str(directory)}


def asks_for_more(args, record):
    """Whether a run that was stopped early is to go on: with more epochs, or more patience."""
    before = record["args"]
    has_more_patience = args.tolerance == 0 or args.tolerance > before["tolerance"]
    return has_more_patience or args.epochs > before["epochs"]


def last_epoch(args):
    """After which epoch this process ends at the latest."""
    return min(args.epochs, args.stop_after or args.epochs)


class Run:
    """A run directory: `record` is run.json, `history` the rows of log.jsonl.

    Each save is whole, or not made at all.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.record = read_record(directory)
        self.history = []
        self.keep = self.record["args"].get("keep", "best")  # older runs have none
        self.status = "failed"
        self.wandb = None
        self.began = time.perf_counter() - self.record["seconds"]

    def write_record(self, **changes):
        """Write run.json with these changes."""
        self.record.update(changes, seconds=time.perf_counter() - self.began)
        write_json(self.directory / "run.json", self.record)

    def save(self, parts):
        """Save after an epoch: first last.pt, with the history and the state of each of `parts`."""
        states = {name: part.state_dict() for name, part in parts.items()}
        state = {"run": self.record["name"], "history": self.history, **states}
        save_checkpoint(self.directory / "last.pt", state)
        self.record["test"] = None  # it was of the best epoch before
        self.write_results(parts)

    def write_results(self, parts):
        """Write what follows from last.pt: best.pt, where it is a new best, log.jsonl, run.json."""
        best = None
        if self.history:
            row = min(self.history, key=lambda row: row["val_loss"])
            if self.keep == "last":
                row = self.history[-1]
            best = {name: row[name] for name in ("epoch", "val_loss", "val_acc")}
            best["temperature"] = parts["model"].config["temperature"]
        path = self.directory / "best.pt"
        if best and (best != self.record["best"] or not path.exists()):
            weights = {"weights": parts["early_stopping"].best_weights}
            save_checkpoint(path, parts["model"].config | best | weights)
        write_json_lines(self.directory / "log.jsonl", self.history)
        self.write_record(epochs=len(self.history), best=best)

    def restore(self, parts):
        """Give `parts` their state in last.pt, and make the other files agree with it.

        Returns the epochs that are done, 0 where none was saved. RunError.
        """
        for leftover in self.directory.glob(".*.tmp"):  # of a process that was killed in a save
            leftover.unlink()
        path = self.directory / "last.pt"
        if path.exists() or self.record["epochs"]:
            state = load_checkpoint(path)
            if state["run"] != self.record["name"]:
                raise RunError(f"{shown(path)} is of another run, {state['run']}")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.history = state["history"]
        self.write_results(parts)
        return len(self.history)

    def result(self):
        """The content of run.json, with the run's `directory`."""
        return self.record | {"directory": str(self.directory)}

    def report(self, quiet):
        """Say how the run has ended."""
        best, test = self.record["best"], self.record["test"]
        if best:
            say(
                f"{self.keep} epoch {best['epoch']}: validation loss {best['val_loss']:.4f}, "
                f"accuracy {best['val_acc']:.2%}",
                quiet,
            )
        if test:
            line = (
                f"test loss {test['loss']:.4f}, "
                f"accuracy {test['acc']:.2%} of {self.record['data']['test']:,} images"
            )
            if "plain_acc" in test:
                line += f", {test['plain_acc']:.2%} without averaged views"
            say(line, quiet)
        say(f"{self.record['status'].replace('_', ' ')}: {shown(self.directory)}", quiet)


def new_record(args, model, data):
    """run.json of a run that begins."""
    known = {name: value for name, value in vars(args).items() if name not in NOT_RECORDED}
    return {
        "format": FORMAT,
        "name": args.directory.name,
        "script": args.script,
        "argv": args.argv,
        "args": known,
        "status": "running",
        "error": None,
        "started": utc_now(),
        "ended": None,
        "seconds": 0.0,
        "seed": args.seed,
        **environment(args),
        "data": {"name": args.dataset, **data.about()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "frozen": model.config.get("frozen"),  # the checksum of frozen.pt
        "epochs": 0,
        "best": None,
        "test": None,
    }


@contextlib.contextmanager
def open_run(args: Namespace, model: torch.nn.Module, data: Any) -> Iterator[Run]:
    """Make the run's directory, or open that of --resume, hold its lock, and say how it ended.

    A signal, and a loss that is not finite, end the `with` block early. They are no exceptions to
    the caller, but the `status` in run.json. UsageError, RunError.
    """
    directory = args.directory
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / ".lock"):
        # Write down what is begun, or look whether the images are those that it was begun with.
        if not args.resume:
            already_done(args)  # another process may have taken the name while the data were loaded
            if data.files == "data.csv":
                write_atomically(directory / "data.csv", data.listing)
            if args.freeze:
                weights = {"weights": model.state_dict()}
                model.config["frozen"] = save_checkpoint(directory / "frozen.pt", weights)
            write_json(directory / "run.json", new_record(args, model, data))
        run = Run(directory)
        record = run.record
        if args.resume and args.freeze:
            model.config["frozen"] = record["frozen"]
            frozen = load_checkpoint(directory / "frozen.pt", record["frozen"])
            model.load_state_dict(frozen["weights"])
        data.check(record["data"], args.dataset, directory)

        # Take note of what may change when a run goes on, also when early stopping had ended it.
        if record["status"] == "stopped_early" and asks_for_more(args, record):
            record["prolonged_after"] = record["epochs"]
        for name in ("epochs", "tolerance", "dataset"):
            record["args"][name] = getattr(args, name)
        say(
            f"{record['name']}: {args.model}, {record['parameters']:,} parameters; "
            f"{args.device}, {args.precision}",
            args.quiet,
        )

        # Here the training runs; its end is written down, whatever it is.
        error = None
        try:
            with interruptible():
                run.write_record(**environment(args), status="running", error=None, ended=None)
                run.wandb = start_wandb(args, run)
                yield run
            status = run.status
        except KeyboardInterrupt as interruption:
            status = "interrupted"
            error = str(interruption) or "SIGINT"
        except FloatingPointError as reason:
            status = "diverged"
            error = f"{reason} in epoch {len(run.history) + 1}"
        except BaseException as failure:
            error = f"{type(failure).__name__}: {failure}"
            with contextlib.suppress(RunError):  # the disk may have failed: tell the first error
                run.write_record(status="failed", error=error, ended=utc_now())
            raise
        finally:
            finish_wandb(run, failed=error is not None)
        run.write_record(status=status, error=error, ended=utc_now())
        run.report(args.quiet)


# ------------------------ Weights & Biases ------------------------
def check_wandb(mode: str, quiet: bool) -> None:
    """What can be known of --wandb before anything is loaded. UsageError."""
    if mode == "disabled":
        return
    if not importlib.util.find_spec("wandb"):
        raise UsageError(f"--wandb {mode} needs the package wandb: pip install wandb")
    if mode == "online" and not has_wandb_key(quiet):
        raise UsageError(
            "--wandb online needs an API key: `wandb login`, WANDB_API_KEY, or use --wandb offline"
        )


def has_wandb_key(quiet):
    """Whether W&B has an API key, and is online. UsageError where its settings are not valid."""
    import wandb

    try:
        wandb.setup(settings=wandb.Settings(silent=quiet))
        return bool(wandb.login(prompt=False, verify=False))
    except (wandb.errors.Error, ValueError) as error:
        raise UsageError(f"Weights & Biases: {error}") from error


def start_wandb(args, run):
    """The W&B run of --wandb, None where it is disabled. RunError."""
    if args.wandb == "disabled":
        return None
    import wandb

    # A run that goes on does so in its own W&B run, which no run of the same name elsewhere shares.
    # In a W&B sweep the agent has named it.
    name = run.record["name"]
    named = {}
    if "WANDB_SWEEP_ID" not in os.environ:
        started = re.sub("[^0-9]", "", run.record["started"])
        named = {"id": f"{name}-{started}"[-128:], "resume": "allow"}
    try:
        return wandb.init(
            config=run.record["args"],
            project=args.wandb_project,
            name=name,
            dir=run.directory,
            mode=args.wandb,
            settings=wandb.Settings(silent=args.quiet, console="off"),
            **named,
        )
    except wandb.errors.Error as error:
        raise RunError(f"--wandb {args.wandb}: {error}") from error


@contextlib.contextmanager
def wandb_failures_told(run):
    """Tell what goes wrong with W&B, and go on without it: it does not end a training."""
    try:
        yield
    except Exception as error:
        if type(error) is Exception:  # so W&B's agent stops a run of a sweep
            raise
        print(f"W&B failed ({type(error).__name__}: {error}): going on without it", file=sys.stderr)
        run.wandb = None


def log_wandb(run, row):
    """Log an epoch, with the best so far, which is what a W&B sweep compares."""
    with wandb_failures_told(run):
        if run.wandb:
            best = {f"best_{name}": value for name, value in run.record["best"].items()}
            run.wandb.log(row | best, step=row["epoch"], commit=True)


def finish_wandb(run, failed):
    """End the W&B run, if there is one, with the best epoch's results as its summary."""
    with wandb_failures_told(run):
        if run.wandb:
            tested = {f"test_{name}": value for name, value in (run.record["test"] or {}).items()}
            run.wandb.summary.update((run.record["best"] or {}) | tested)
            run.wandb.finish(exit_code=int(failed))
