"""Runs stages, each a process group with a limit of its own, and keeps what each found before the
next one begins. Imports no torch.

    run([alone(Stage("name", ("command", "argument"), 10.0))], Output(folder), time.monotonic() +
    60)

Any command can be a stage: it appends its answer, objects in JSON, a line each, to the file that
UEGR_GPU_ANSWER names, or is `silent`.
"""

import contextlib
import ctypes
import fcntl
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).parent.parent
# Of a stage's environment: the file it answers in, what marks its processes, and when it is killed,
# by time.monotonic().
ANSWER, MARK, END = "UEGR_GPU_ANSWER", "UEGR_GPU_STAGE", "UEGR_GPU_END"
# in the folder of results at most
FILES = 6
# bytes kept of a stage's log
LOG = 200_000
# seconds between SIGTERM and SIGKILL, within the limit
GRACE = 1.0
# seconds that a killed process has to go; one that waits for a driver may never
DEATH = 2.0
# exit statuses
FAILED, WRONG_BACKEND, TOO_FEW_TESTS = 1, 4, 5


@dataclass(frozen=True)
class Stage:
    """Holds a command that is killed after `limit` seconds.

    It answers in JSON, a line at a time, by `answer`; what it says under one key twice counts as
    said last.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    # that it measures
    backend: str | None = None
    # that it runs at least, where it runs tests
    least_tests: int | None = None
    # Of other people, that it runs under. Where that ends badly before the stage has said `begun`,
    # it does not work here.
    program: str | None = None
    # other people's program, which does not answer
    silent: bool = False


@dataclass(frozen=True)
class Wave:
    """Holds stages that run at the same time, `at_once` of them at most, and end within `limit`
    seconds in all.
    """

    stages: tuple[Stage, ...]
    limit: float
    at_once: int = 1


@dataclass(frozen=True)
class Stop:
    """Says why a run ends before its last stage."""

    status: int
    reason: str


def alone(stage: Stage) -> Wave:
    return Wave((stage,), stage.limit)


def answer(said: dict) -> None:
    """Gives a stage's answer: to the runner, or on the terminal where the stage was started by
    hand.
    """
    text = json.dumps(said)
    if path := os.environ.get(ANSWER):
        with open(path, "a") as file:
            file.write(text + "\n")
    else:
        print(text, flush=True)


class Output:
    """Keeps a folder of results: gpu.jsonl, a line a stage, and logs.tar.gz; gpu.md and gpu.png are
    the report's.

    What an earlier run left in gpu.jsonl and logs.tar.gz stays there. ValueError: the folder holds
    too much else.
    """

    OURS = ("gpu.jsonl", "gpu.md", "gpu.png", "logs.tar.gz")

    def __init__(self, folder: pathlib.Path):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output {folder} is a file; name a folder")
        others = (
            sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
            if folder.exists()
            else []
        )
        others = [name for name in others if name not in self.OURS]
        if len(others) > FILES - len(self.OURS) or any(name.endswith("/") for name in others):
            raise ValueError(
                f"--output {folder} would hold more than {FILES} files, or folders: there is "
                f"{', '.join(others[:9])}; name a new folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run, self.records, self.logs = (
            folder,
            time.strftime("%Y%m%d-%H%M%S", time.gmtime()),
            [],
            {},
        )
        # one that was copied in part: as far as it goes
        broken = (FileNotFoundError, tarfile.TarError, EOFError, zlib.error)
        with contextlib.suppress(*broken), tarfile.open(folder / "logs.tar.gz") as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                self.logs[member.name] = archive.extractfile(member).read()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Sees that no other process claims the folder meanwhile. ValueError: one has. OSError: it
        cannot be written to.
        """
        with (self.folder / "gpu.jsonl").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another run is writing to --output {self.folder}; name another "
                    "folder, or wait for its end"
                ) from None
            except OSError:
                # a file system without locks
                pass
            yield

    def keep(self, record: dict, log: bytes = b"") -> str | None:
        """Puts a record on the disk, or returns why it is not there: a full disk ends nothing."""
        record = {"run": self.run} | record
        self.records.append(record)
        try:
            self._put(record, log)
        except OSError as error:
            return f"{record['stage']} is not kept: {error}"
        return None

    def _put(self, record: dict, log: bytes) -> None:
        with (self.folder / "gpu.jsonl").open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # an earlier run was killed while it wrote
                cut = file.read() != b"\n"
                file.write(b"\n" * cut)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if log:
            self.logs[f"{self.run}-{record['stage']}.txt"] = log
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w:gz") as archive:
                for name, text in self.logs.items():
                    member = tarfile.TarInfo(name)
                    member.size, member.mtime = len(text), int(time.time())
                    archive.addfile(member, io.BytesIO(text))
            self.write("logs.tar.gz", packed.getvalue())

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file, whole, or not at all."""
        aside = self.folder / ".aside"
        aside.write_bytes(content)
        os.replace(aside, self.folder / name)


def shortened(path: pathlib.Path) -> bytes:
    """Returns a log, or LOG bytes of its beginning and its end."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= LOG:
            return file.read()
        first = file.read(LOG // 2)
        file.seek(size - LOG // 2)
        return first + b"\n[...]\n" + file.read(LOG // 2)


def run(
    waves: list[Wave],
    output: Output,
    until: float,
    judge: Callable[[Stage, dict], Stop | None] = lambda *_: None,
    show: Callable[[dict], None] = lambda _: None,
) -> Stop | None:
    """Runs the waves in their order; a line a stage goes to `output` and to `show`. `until`: by
    time.monotonic().

    Where less time is left than a wave may take, it and all after it fall. `judge` looks at each
    record, and may stop the run.
    """
    reason: str | None = None
    stop: Stop | None = None

    def said(record: dict, log: bytes = b"") -> None:
        not_kept = output.keep(record, log)
        show(record | ({"not_kept": not_kept} if not_kept else {}))

    for wave in waves:
        left = until - time.monotonic()
        if reason is None and wave.limit > left:
            reason = f"{max(0, left):.0f} s were left, and it may take {wave.limit:.0f}"
        waiting = list(wave.stages)
        if reason is None:
            with contextlib.closing(run_wave(wave)) as ended:
                for stage, record, log in ended:
                    waiting.remove(stage)
                    said(record, log)
                    if stop := judge(stage, record):
                        reason = f"stopped: {stop.reason}"
                        break
        for stage in waiting:
            said({"stage": stage.name, "status": "left out", "message": reason})
        if waiting and not stop:
            reason = "an earlier stage had fallen for lack of time"
    return stop


def run_wave(wave: Wave) -> Iterator[tuple[Stage, dict, bytes]]:
    """Yields each stage as it ends, with its record and its log. No process of a stage outlives
    it, nor the generator.
    """
    end = time.monotonic() + wave.limit
    waiting, running = list(wave.stages), []
    with tempfile.TemporaryDirectory(prefix="uegr-gpu-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < wave.at_once:
                    stage = waiting.pop(0)
                    if why_not := not_started(stage, end):
                        yield (
                            stage,
                            {"stage": stage.name, "status": "left out", "message": why_not},
                            b"",
                        )
                        continue
                    try:
                        running.append(Running(stage, pathlib.Path(folder), end))
                    except (OSError, ValueError) as error:
                        yield (
                            stage,
                            {
                                "stage": stage.name,
                                "status": "failed",
                                "message": f"it could not be started: {error}",
                            },
                            b"",
                        )
                for each in [each for each in running if each.over()]:
                    running.remove(each)
                    yield each.stage, each.record(), shortened(each.log)
                time.sleep(0.02)
        finally:
            for each in running:
                each.kill()


def not_started(stage: Stage, end: float) -> str | None:
    if stage.program and not shutil.which(stage.program):
        return f"{stage.program} was not found"
    return (
        None
        if time.monotonic() + 2 * GRACE < end
        else ("the stages beside it took all the time they had together")
    )


class Running:
    """Holds a stage at work."""

    def __init__(self, stage: Stage, folder: pathlib.Path, end: float):
        self.stage, self.log, self.answers = (
            stage,
            folder / f"{stage.name}.txt",
            folder / f"{stage.name}.jsonl",
        )
        self.mark, self.asked, self.killed = uuid.uuid4().hex, False, False
        self.started = time.monotonic()
        self.end = min(end, self.started + stage.limit)
        given = {
            "PYTHONUNBUFFERED": "1",
            ANSWER: str(self.answers),
            MARK: self.mark,
            END: str(self.end),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env=os.environ | given | stage.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_the_runner,
            )

    def over(self) -> bool:
        """Returns whether it has ended; at its limit it is asked to, then made to."""
        now = time.monotonic()
        # it keeps its number until it is waited for
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        if now >= self.end:
            self.killed = True
            return True
        if now >= self.end - min(GRACE, self.stage.limit / 2) and not self.asked:
            self.asked = True
            os.killpg(self.process.pid, signal.SIGTERM)
        return False

    def kill(self) -> int:
        """Ends all that is left of it, in its group or out of it; returns how many processes
        beside its first one that were.
        """
        behind = marked(f"{MARK}={self.mark}".encode()) - {self.process.pid}
        for _ in range(100):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            left = marked(f"{MARK}={self.mark}".encode())
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                break
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(DEATH)
        return len(behind)

    def record(self) -> dict:
        behind = self.kill()
        seconds, code = time.monotonic() - self.started, self.process.returncode
        result, cut = answers(self.answers)
        record: dict = {
            "stage": self.stage.name,
            "status": "passed",
            "seconds": round(seconds, 2),
            "limit": self.stage.limit,
            "exit": code,
        }
        if self.killed or self.asked:
            record |= {"status": "killed", "message": f"killed at its limit, after {seconds:.0f} s"}
        elif code and self.stage.program and "begun" not in result:
            record |= {
                "status": "left out",
                "message": f"{self.stage.program} does not work here: {self.last_words()}",
            }
        elif code < 0:
            record |= {
                "status": "crashed",
                "message": f"died by {signal.Signals(-code).name}: {self.last_words()}",
            }
        elif code:
            record |= {"status": "failed", "message": self.last_words()}
        elif cut or not (result or self.stage.silent):
            record |= {
                "status": "failed",
                "message": "its last line of answer is cut off"
                if cut
                else "it ended without an answer",
            }
        if behind:
            record["left_behind"] = behind
        return record | ({"result": result} if result else {})

    def last_words(self) -> str:
        lines = shortened(self.log)[-4000:].decode(errors="replace").split("\n")
        return next(
            (text.strip()[:300] for text in reversed(lines) if text.strip()), "it said nothing"
        )


def answers(path: pathlib.Path) -> tuple[dict, bool]:
    """Returns what the whole lines of a file say, and whether one of them could not be read."""
    result, cut = {}, False
    for text in path.read_text(errors="replace").split("\n") if path.exists() else []:
        try:
            said = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            said = None
        if isinstance(said, dict):
            result |= said
        else:
            cut = True
    return result, cut


def marked(mark: bytes) -> set[int]:
    """Returns the living processes with a mark in their environment, whatever group or session they
    are in (Linux; elsewhere none is seen).
    """
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
    return found


LIBC = ctypes.CDLL(None)


def die_with_the_runner() -> None:
    """Prepares a new process, before its program: the kernel kills it when the runner dies, however
    that happens (Linux).
    """
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGKILL)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[None]:
    """Makes SIGTERM a KeyboardInterrupt inside: stages are killed and what is known is written. A
    terminal that is gone ends nothing.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def too_few(stage: Stage, record: dict) -> Stop | None:
    """Stops the run where a stage's tests came to their end, and some of those expected did not
    run, or fewer were there than there must be.

    One that was killed or crashed has not come to its end: its record says how far it came.
    """
    if stage.least_tests is None or record["status"] not in ("passed", "failed"):
        return None
    result = record.get("result", {})
    expected, finished = (
        result.get("expected", 0),
        result.get("passed", 0) + len(result.get("failed", ())) + result.get("excused", 0),
    )
    ran = result.get("collected", finished)
    reasons = "".join(f"; skipped: {reason}" for reason in result.get("skipped", ())[:3])
    if expected < stage.least_tests:
        return Stop(
            TOO_FEW_TESTS,
            f"{stage.name}: {expected} tests were found, at least "
            f"{stage.least_tests} are expected{reasons}",
        )
    return (
        Stop(TOO_FEW_TESTS, f"{stage.name}: {ran} of {expected} tests ran{reasons}")
        if ran < expected
        else None
    )
