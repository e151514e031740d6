"""The tree in which a broken kernel is compiled and linked."""

from __future__ import annotations

import filecmp
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emulator.build import BACKEND, CSRC, OUTPUT, NinjaFile, build, library
from mutation.find import Mutant


class Tree:
    """A copy of csrc, and of the objects of the race build, to be broken and put right again."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder, self.jobs = folder, jobs
        self.csrc, self.objects = folder / "csrc", folder / "objects"
        shutil.copytree(CSRC, self.csrc)
        built = build("race", jobs=jobs)
        shutil.copytree(OUTPUT / "race", self.objects)
        self._must_be_what_was_built()
        *compilations, link = self._commands(built)
        self.link = link.partition(" && ")[0]  # without the move to its place
        self.compile: dict[str, str] = {}
        for command in compilations:
            if found := re.search(rf"-x c\+\+ {re.escape(str(self.csrc))}/(\S+\.cu) ", command):
                self.compile[found[1]] = command

    def _must_be_what_was_built(self) -> None:
        for path in CSRC.rglob("*"):
            copy = self.csrc / path.relative_to(CSRC)
            if path.is_file() and not (copy.exists() and filecmp.cmp(path, copy, shallow=False)):
                raise SystemExit(f"{path} changed while it was built; run this again")

    def _commands(self, built: Path) -> list[str]:
        """Those of the race build, over the copies."""
        ninja = [NinjaFile("race").setup.ninja_path(), "-f", f"{built}.ninja"]
        listed = subprocess.run(
            [*ninja, "-t", "commands", str(library("race"))],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        moved = listed.replace(str(CSRC), str(self.csrc))
        return moved.replace(str(OUTPUT / "race"), str(self.objects)).splitlines()

    def included(self, path: str) -> set[str]:
        """What a file includes, itself among it."""
        found, open_ = set(), [self.csrc / path]
        while open_:
            file = open_.pop()
            if file in found:
                continue
            found.add(file)
            for name in re.findall(r'#include "([^"]+)"', file.read_text()):
                inner = (file.parent / name).resolve()
                if inner.is_file():
                    open_.append(inner)
        return {file.relative_to(self.csrc).as_posix() for file in found}

    def dependents(self, path: str) -> list[str]:
        """The sources to compile again."""
        return [source for source in self.compile if path in self.included(source)]

    def make(self, changed: list[str], name: str) -> Path:
        """Compile these sources and link them with the rest."""
        link, output = self.link, self.folder / f"{name}.so"
        commands = []
        for source in changed:
            kept, fresh = self.object(source), self.folder / name / f"{source}.o"
            fresh.parent.mkdir(parents=True, exist_ok=True)
            commands.append(self.compile[source].replace(str(kept), str(fresh)))
            link = link.replace(str(kept), str(fresh))
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(execute, commands))
        execute(link.replace(f"{self.objects / BACKEND}.part", str(output)))
        return output

    def object(self, source: str) -> Path:
        return self.objects / f"csrc/{source}.o"

    def broken(self, mutant: Mutant, name: str) -> Path:
        """The library with one mutant."""
        path = self.csrc / mutant.path
        before = path.read_text()
        path.write_text(mutant.text)
        try:
            return self.make(self.dependents(mutant.path), name)
        finally:
            path.write_text(before)

    def clean(self, name: str) -> None:
        (self.folder / f"{name}.so").unlink(missing_ok=True)
        shutil.rmtree(self.folder / name, ignore_errors=True)


def execute(command: str) -> None:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a mutant must compile: {command}\n{done.stderr}")
