"What tests start: commands, functions and scripts, here or in processes of their own."

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psutil

COMMAND = [sys.executable, "-c", "from vlkd.tools.cli import main; main()"]


def vlkd(*args, **options) -> subprocess.CompletedProcess:
    "The command, in a process of its own."
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, **options)


def command(*args) -> subprocess.CompletedProcess:
    "The command, in this process."
    from vlkd.tools.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            return subprocess.CompletedProcess(args, end.code, out.getvalue(), err.getvalue())


def refused(says: str, *args):
    "A command ends with exit code 2 and one line that says why."
    done = command(*args)
    assert done.returncode == 2 and says in done.stderr, done
    assert done.stderr.startswith("vlkd: ") and done.stderr.count("\n") == 1, done.stderr


def quiet(function, *args) -> tuple:
    "What a function returns, and what it printed."
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = function(*args)
    return result, printed.getvalue()


def forked(function, *, size=None, after=None, output=os.devnull, seconds=120) -> int:
    """Exit code of `function()` in a process of its own, 99 where it raises; it is killed `after` seconds.
    Files end at `size` bytes, as on a full disk. What it prints goes to the file `output`."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _settle_in(size, output, seconds)
            try:
                function()
                os._exit(0)
            except SystemExit as end:
                os._exit(end.code or 0)
            except BaseException:
                traceback.print_exc()
        os._exit(99)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _settle_in(size, output, seconds):
    signal.alarm(seconds)  # a fork of a process with threads may wait for a lock that none of its own holds
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", 1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, closefd=False)
    if size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def script(code: str, *args, **environment) -> subprocess.CompletedProcess:
    """Run a script in a process that begins with what is imported here; what it changes there stays there.
    `stdout` has all that it printed."""

    def run():
        os.environ.update(environment)
        sys.argv = ["-c", *map(str, args)]
        exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})

    with tempfile.NamedTemporaryFile() as output:
        returncode = forked(run, output=output.name, seconds=400)
        return subprocess.CompletedProcess(args, returncode, Path(output.name).read_text())


def wait_for(condition, seconds=60):
    "Wait until something holds."
    end = time.time() + seconds
    while time.time() < end:
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing came in {seconds} s")


def gone(processes) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def tree(process) -> list:
    "A process with all that it has started."
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def holder(toy, name: str) -> psutil.Process:
    "The process that computes a run: it has the lock from its worker, and its kernel may have it from it."
    lock = str(toy.d / "runs/smoke/.locks" / name)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(file.path == lock for file in process.open_files()):
                found.append(process)
    return sorted(found, key=psutil.Process.create_time)[1]


def content(folder) -> dict:
    "Bytes of the files of a folder, by name."
    files = Path(folder).iterdir() if Path(folder).exists() else []
    return {p.name: p.read_bytes() for p in files if not p.name.startswith(".lock")}
