"""The ``jaxsys`` program: what a user can mend is one line and an exit code, the rest keeps its traceback.

Nothing heavy is imported before ``main`` runs: an interrupt meanwhile ends like any other.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback

from jaxsys.malloc import restart_with_tunables

INTERRUPTED = 128 + signal.SIGINT
COLLECTIVE_SECONDS = "--xla_cpu_collective_call_terminate_timeout_seconds"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        from jaxsys.cli.command_line import parse

        code = parse(sys.argv[1:] if argv is None else argv).run()
        sys.stdout.flush()  # here, where a full disk can still be told
        return code
    except KeyboardInterrupt:
        print("jaxsys: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone: not an error of ours
        _drop_output()
        return 128 + signal.SIGPIPE
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        print(f"jaxsys: {reason}", file=sys.stderr)
        return 2


def _reason(error: Exception) -> str | None:
    """The one line of an error that a user can mend; None for a defect."""
    if isinstance(error, OSError):
        if error.filename is not None:
            return f"{error.filename}: {error.strerror}; check the path, its permissions and the disk"
        if error.errno == errno.ENOSPC:  # what is written to an open file names none
            _drop_output()
            return f"{error.strerror}: the output cannot be written; make room on the disk"
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename.replace(os.sep, "/")
    if raised_in.endswith(("jax/_src/xla_bridge.py", "jax/_src/config.py")):  # JAX's own start-up, from its variables
        set_ = " ".join(f"{k}={v}" for k, v in os.environ.items() if k in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"))
        what = " ".join(str(error).split()) or "no such platform on this machine"
        return f"JAX does not start with {set_ or 'this environment'}: {what}; change or unset it"
    from parallelism.errors import UserError

    return str(error) if isinstance(error, UserError) else None  # of an object store it is an OSError too


def _drop_output() -> None:
    """What is still in the buffer goes nowhere, so that the interpreter does not fail on it again as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def let_virtual_devices_wait() -> None:
    """Makes XLA on CPU wait ten minutes in a collective, as ``liveness.stuck`` does, before it takes it for a hang.

    After one it ends the process. But virtual devices share cores, and one that computes while others wait may need
    more than that. Does nothing where there are none, or where somebody has set it. XLA reads it as a device is made.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    virtual = "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in flags
    if virtual and COLLECTIVE_SECONDS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {COLLECTIVE_SECONDS}=600".lstrip()


def entry() -> None:
    """The ``jaxsys`` program."""
    try:
        restart_with_tunables()
        let_virtual_devices_wait()
        code = main()
    except KeyboardInterrupt:  # between two lines of ``main``'s own
        code = INTERRUPTED
    except Exception:
        traceback.print_exc()
        code = 1
    # What an interrupt left running in threads (a compile) would go on in an interpreter that is being taken down; and
    # JAX would wait for the other processes of a job, which this one has left.
    left = "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()
    if code == INTERRUPTED or (code and left):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
