"""Plant known faults in a copy of the checkout, one at a time, and say which test notices each.

    python tests/mutants.py                       all faults of tests/faults/*.toml
    python tests/mutants.py 'clustering *'        those whose names match
    python tests/mutants.py --without-servers     those whose tests start no server
    python tests/mutants.py --list                print them and end

A fault names a file (or a pattern of files), a piece of its text that occurs exactly once, the text that
replaces it, and the tests that should fail then. The work tree is never changed. The copy has a virtual
environment of its own over this one's packages, since Triton's model processes import what the
environment names, whatever PYTHONPATH says.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "faults"
_SERVER_TESTS = ("tests/triton",)
_LONGEST = 900  # seconds for the tests of one fault; a fault that hangs them is noticed
_NO_SUCH_TESTS = (4, 5)  # pytest's exit codes for a wrong command line, and for no test at all
_SUMMARY = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


class FaultError(Exception):
    """A fault cannot be planted, or its tests cannot be run."""


@dataclass(frozen=True)
class Fault:
    """One change of the code that a test should notice.

    Attributes:
        name: unique among all faults.
        file: path or pattern below the checkout; all files that match are searched.
        old: text that occurs in them exactly once.
        new: its replacement.
        tests: paths, patterns of paths or node ids of the tests to run.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def needs_a_server(self) -> bool:
        """True if one of its tests starts a server."""
        return any(test.startswith(_SERVER_TESTS) for test in self.tests)


def load_faults(folder: Path = FAULTS) -> list[Fault]:
    """Read the faults of all lists of a folder.

    Raises:
        FaultError: a fault is incomplete, or a name comes twice.
    """
    faults: dict[str, Fault] = {}
    for path in sorted(folder.glob("*.toml")):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        common = {key: value for key, value in content.items() if key != "fault"}
        for entry in content["fault"]:
            fields = {**common, **entry}
            missing = {"name", "file", "old", "new", "tests"} - set(fields)
            if missing or not fields["tests"]:
                raise FaultError(f"{path.name}: {entry.get('name')!r} has no {', '.join(missing) or 'tests'}")
            fault = Fault(**{**fields, "tests": tuple(fields["tests"])})
            if fault.name in faults:
                raise FaultError(f"{path.name}: {fault.name!r} comes twice")
            faults[fault.name] = fault
    return list(faults.values())


def locate(root: Path, fault: Fault) -> Path:
    """Find the file that holds the text of a fault.

    Raises:
        FaultError: the text does not occur exactly once, or Python cannot compile its replacement.
    """
    files = [path for path in sorted(root.glob(fault.file)) if path.is_file()]
    found = {path: path.read_text(encoding="utf-8").count(fault.old) for path in files}
    total = sum(found.values())
    if total != 1:
        raise FaultError(f"its text occurs {total} times in {fault.file} ({len(files)} files), expected once")
    path = next(path for path, count in found.items() if count)
    if path.suffix == ".py":
        compile(path.read_text(encoding="utf-8").replace(fault.old, fault.new), str(path), "exec")
    return path


def find_tests(root: Path, tests: Sequence[str]) -> list[str]:
    """Replace patterns of paths by the paths that match.

    Raises:
        FaultError: nothing matches.
    """
    found = []
    for test in tests:
        pattern, mark, node = test.partition("::")
        paths = sorted(str(path.relative_to(root)) for path in root.glob(pattern))
        if not paths:
            raise FaultError(f"there is no {pattern}")
        found += [f"{path}{mark}{node}" for path in paths]
    return found


class Copy:
    """A copy of the checkout, and a virtual environment that imports its code.

    Args:
        folder: where to make it; empty.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self._environment = folder / "environment"
        _copy_checkout(self.root)
        _make_environment(self._environment, self.root)
        self._check_imports()

    def _check_imports(self) -> None:
        code = "import siglip_serve, siglip_serve_client as c; print(siglip_serve.__file__, c.__file__)"
        done = self._run(["-c", code])
        for path in done.stdout.split() or [done.stderr]:
            if not path.startswith(str(self.root)):
                raise FaultError(f"the copy in {self.root} imports {path}")

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[Path]:
        """The file that holds a fault, until the block ends."""
        path = locate(self.root, fault)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        try:
            yield path
        finally:
            path.write_text(text, encoding="utf-8")

    @contextmanager
    def broken(self, path: Path) -> Iterator[None]:
        """Make a file impossible to import, until the block ends."""
        text = path.read_text(encoding="utf-8")
        path.write_text("raise RuntimeError('planted')\n", encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")

    def test(self, tests: Sequence[str], *, stop: bool = True) -> list[str]:
        """Run tests.

        Args:
            tests: paths or node ids.
            stop: end at the first failure.

        Returns:
            What failed, as node ids; empty if all passed.

        Raises:
            FaultError: there are no such tests.
        """
        words = [
            *("-m", "pytest", "-p", "no:cacheprovider", "--tb=no", "-rfE"),
            *(["-x"] if stop else []),
            *find_tests(self.root, tests),
        ]
        try:
            done = self._run(words, timeout=_LONGEST if stop else None)
        except subprocess.TimeoutExpired:
            return [f"no end within {_LONGEST} s"]
        if done.returncode in _NO_SUCH_TESTS:
            raise FaultError((done.stderr or done.stdout).strip()[-500:])
        if done.returncode == 0:
            return []
        return _SUMMARY.findall(done.stdout) or [f"pytest ended with {done.returncode}"]

    def _run(self, words: Sequence[str], timeout: float | None = 120) -> subprocess.CompletedProcess[str]:
        # Bytecode is not kept: a change of the same length within one second would not be seen.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [self._environment / "bin" / "python", *words],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def _copy_checkout(target: Path) -> None:
    """Copy the files of the checkout that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def _make_environment(folder: Path, root: Path) -> None:
    """Make a virtual environment of the packages of this one and the code of `root`."""
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    paths = [root / "src", root / "clients", Path(sysconfig.get_path("purelib"))]
    # Read line by line as further folders of modules; the .pth files in them are not read.
    (packages / "mutants.pth").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    own = Path(sysconfig.get_path("scripts"))
    for script in own.iterdir():
        target = folder / "bin" / script.name
        if target.exists() or script.is_dir():
            continue
        content = script.read_bytes()
        if content.startswith(f"#!{own}/".encode()):
            target.write_bytes(content.replace(f"#!{own}/".encode(), f"#!{folder / 'bin'}/".encode(), 1))
            target.chmod(0o755)
        else:
            target.symlink_to(script)


@dataclass(frozen=True)
class Result:
    """The outcome of one fault.

    Attributes:
        fault: the fault.
        noticed: the first test that failed; empty if none did.
        remark: why the result means nothing; empty if it does.
        seconds: how long its tests took.
    """

    fault: Fault
    noticed: str
    remark: str
    seconds: float

    def __str__(self) -> str:
        said = self.remark or self.noticed or "NOT NOTICED"
        return f"{self.fault.name:<58} {self.seconds:5.1f} s  {said}"


def try_fault(copy: Copy, fault: Fault) -> Result:
    """Plant one fault and run its tests."""
    begin = time.monotonic()
    noticed, remark = "", ""
    try:
        with copy.planted(fault) as path:
            noticed = next(iter(copy.test(fault.tests)), "")
        if not noticed and path.suffix == ".py":
            with copy.broken(path):
                if not copy.test(fault.tests):
                    remark = f"NOT IMPORTED: its tests pass without {path.relative_to(copy.root)}"
    except (FaultError, SyntaxError) as error:
        remark = f"NOT PLANTED: {error}"
    return Result(fault, noticed, remark, time.monotonic() - begin)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", default=["*"], help="faults to plant; * and ? stand for any text")
    parser.add_argument("--jobs", type=int, default=1, help="faults that are tried at the same time")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--without-servers", action="store_true", help="only faults whose tests start none")
    return parser.parse_args()


def _select(arguments: argparse.Namespace) -> list[Fault]:
    return [
        fault
        for fault in load_faults()
        if any(fnmatch.fnmatch(fault.name, name) for name in arguments.names)
        and not (arguments.without_servers and fault.needs_a_server)
    ]


def _problems(faults: Sequence[Fault]) -> Iterator[str]:
    """Say what keeps faults from being planted, or their tests from being run."""
    for fault in faults:
        try:
            locate(ROOT, fault)
            find_tests(ROOT, fault.tests)
        except (FaultError, SyntaxError) as error:
            yield f"{fault.name!r}: {error}"


def main() -> int:
    """Try the faults that the command line names; 1 if one of them is not noticed."""
    arguments = _parse_arguments()
    faults = _select(arguments)
    if arguments.list:
        for fault in faults:
            print(f"{fault.name:<58} {fault.file}")
    if problems := list(_problems(faults)):
        raise FaultError("\n".join(problems))
    if arguments.list:
        return 0
    if not faults:
        raise FaultError(f"no fault is named {' or '.join(arguments.names)}")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(arguments.jobs):
            copies.put(Copy(Path(folder) / str(number)))
        copy = copies.get()
        tests = sorted({test for fault in faults for test in fault.tests})
        print(f"{len(faults)} faults; first their tests without any", flush=True)
        if failed := copy.test(tests, stop=False):
            raise FaultError(f"these fail without a fault: {', '.join(failed)}")
        copies.put(copy)

        def work(fault: Fault) -> Result:
            own = copies.get()
            try:
                result = try_fault(own, fault)
            finally:
                copies.put(own)
            print(result, flush=True)
            return result

        results = list(pool.map(work, faults))
    missed = [result for result in results if result.remark or not result.noticed]
    print(f"{len(results) - len(missed)} of {len(results)} faults noticed")
    for result in missed:
        print(result)
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FaultError as error:
        sys.exit(str(error))
