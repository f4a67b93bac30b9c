"""The process that trains a run: started, found alive after its gateway died, stopped."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from .learning import LearningSettings

STOP_SECONDS = 60.0
SECRETS = ("VERA_ENGINE_KEY",)
"""Of the environment, not passed on."""


def start(folder: Path, settings: LearningSettings) -> subprocess.Popen:
    """`vera fleet train` on the run in this folder. The process holds the folder's lock as long as it lives, also where the
    gateway that started it dies: so nobody starts a second one beside it."""
    with open(folder / "process.lock", "ab") as lock, open(folder / "log.txt", "ab") as log:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "process.json").unlink(missing_ok=True)  # an earlier one's pid may be anybody's by now
        environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
        if settings.threads:
            environment |= {"OMP_NUM_THREADS": str(settings.threads), "MKL_NUM_THREADS": str(settings.threads)}
        command = [sys.executable, "-m", "veralib.cli", "fleet", "train", str(folder / "settings.yaml")]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock.fileno(),),
            start_new_session=True,  # Ctrl-C at the gateway's terminal is for the gateway, which then stops this in order
        )
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process.pid, settings.nice)
    about = json.dumps({"pid": process.pid, "host": socket.gethostname()})
    (folder / "process.json").write_text(about)
    return process


def is_alive(folder: Path) -> bool:
    """Whether a process trains there, whoever started it."""
    try:
        with open(folder / "process.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def stop(folder: Path, process: subprocess.Popen | None = None) -> bool:
    """Asks the process of a run to save where it stands and end; False where it runs on another machine."""
    if process is None:
        try:
            about = json.loads((folder / "process.json").read_text())
        except (OSError, ValueError):
            return not is_alive(folder)
        if about["host"] != socket.gethostname():
            return not is_alive(folder)
        pid = about["pid"]
    else:
        pid = process.pid
    for kind, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 10.0)):
        if not is_alive(folder):  # the lock is held by nobody, so the pid may be anybody's
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, kind)
        deadline = time.monotonic() + seconds
        while is_alive(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
    if process is not None:
        process.wait()
    return not is_alive(folder)


class ForgetFailed(RuntimeError):
    """An owner is still in a fleet's output folder."""


_FORGET = "import sys, pathlib, veralib.fleet.folder as f; f.forget_owner(pathlib.Path(sys.argv[1]), sys.argv[2])"
"""Not `vera fleet forget`: to that, an owner of whom nothing is there yet is an error."""


def forget(folder: Path, name: str) -> None:
    """Removes an owner from a fleet's output folder, in a process: what is there is torch's. ForgetFailed."""
    if (folder / "fleet" / "run.json").exists():
        command = [sys.executable, "-c", _FORGET, str(folder / "fleet"), name]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode:
            why = done.stderr.decode(errors="replace")[-500:]
            raise ForgetFailed(f"the process that removes an owner from {folder} ended with code {done.returncode}: {why}")
