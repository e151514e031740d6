"""Other programs, each in a process of its own: a crash or a hang there ends nothing here."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GRACE = 8.0  # seconds between the request to end and the end
POLL = 0.05


class Finished(NamedTuple):
    """How a program ended, and all it printed."""

    code: int
    text: str
    seconds: float
    timed_out: bool = False


class _Program:
    """One that runs, in a group of processes of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.begin = time.monotonic()
        self.asked_to_end = False
        # Not a pipe: what the program leaves behind would keep it open.
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (until `finish`)
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # What a shell starts in the background ignores it, and so would what that starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def ask_to_end(self) -> None:
        """As Ctrl-C does, upon which pytest still writes its results."""
        if not self.asked_to_end:
            self.asked_to_end = True
            self.process.send_signal(signal.SIGINT)

    def finish(self) -> Finished:
        """End it with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        with self.output as output:
            output.seek(0)
            text = output.read().decode(errors="replace")
        return Finished(code, text, time.monotonic() - self.begin, self.asked_to_end)


def run_all(
    commands: Mapping[str, Sequence[str]],
    seconds: float,
    at_once: int,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Finished]:
    """Run programs in the root of the sources, so many at a time, all within so many seconds."""
    end = time.monotonic() + seconds
    last_call = end - min(GRACE, seconds / 2)
    waiting = list(commands)
    running: dict[str, _Program] = {}
    finished: dict[str, Finished] = {}
    try:
        while waiting or running:
            now = time.monotonic()
            while waiting and len(running) < max(1, at_once) and now < last_call:
                name = waiting.pop(0)
                running[name] = _Program(commands[name], environment or {})
            for name, program in list(running.items()):
                ended = program.has_ended()
                if now > last_call and not ended:
                    program.ask_to_end()
                if ended or now > end:
                    finished[name] = running.pop(name).finish()
            if now > last_call:
                finished |= {name: Finished(-1, "not begun", 0.0, True) for name in waiting}
                waiting = []
            time.sleep(POLL)
    finally:
        for program in running.values():
            program.finish()
    return {name: finished[name] for name in commands}


def run(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run one program."""
    return run_all({"": command}, seconds, 1, environment)[""]


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on the path or where toolkits are."""
    if found := shutil.which(name):
        return found
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        file = Path(home or "") / "bin" / name
        if home and os.access(file, os.X_OK):
            return str(file)
    return None


def tail(text: str, lines: int = 12) -> list[str]:
    """The last lines that are not empty."""
    return [line for line in text.splitlines() if line.strip()][-lines:]
