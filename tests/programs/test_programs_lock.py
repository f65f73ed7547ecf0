"""One program at a time in a folder: the second is refused before any work, whoever holds it and however it ended."""

import builtins
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import types

import pytest
from support.object_store import bucket

from deltaformer_jax import train as train_program
from deltaformer_jax.config import Config
from deltaformer_jax.host import lock, processes
from deltaformer_jax.host.claim import check_claim
from deltaformer_jax.host.lock import alone
from deltaformer_jax.reproduce import __main__ as reproduce
from deltaformer_jax.training.workdir import LOCK, saved_run

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
ME = f"process {os.getpid()} on {socket.gethostname()} since 20"
HOLDER = """
import sys, time
from deltaformer_jax.host.claim import check_claim
from deltaformer_jax.host.lock import alone
with alone(sys.argv[1], "train", "--workdir", print):
    print("held", flush=True)
    time.sleep(100)
"""


def held(folder, notes=None):
    return alone(str(folder), LOCK, f"--workdir {folder}", [].append if notes is None else notes.append)


def test_the_second_is_refused_and_told_who_holds_it(tmp_path):
    folder = tmp_path / "made" / "run"
    with held(folder):
        assert (folder / "train.lock").read_text().startswith(ME)
        with pytest.raises(ValueError, match=f"^--workdir {folder}: in use by {ME}.*; wait until it ends"):
            with held(folder):
                raise AssertionError
        assert (folder / "train.lock").exists()
        with alone(str(folder), "other", "--out", print):
            pass
    assert not list(tmp_path.iterdir())  # what was made for it is gone


def test_what_was_written_stays(tmp_path):
    with held(tmp_path / "run"):
        (tmp_path / "run" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_it_dies_with_its_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on "), held(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["train.lock"]
    assert saved_run(Config(), tmp_path) is None  # the folder is as good as new
    notes = []
    with held(tmp_path, notes):
        assert (tmp_path / "train.lock").read_text().startswith(ME)
    assert not notes and not list(tmp_path.iterdir())


def test_a_lock_left_on_another_host_is_said(tmp_path):
    (tmp_path / "train.lock").write_text("process 7 on elsewhere since 2026-01-01 00:00:00+00:00\n")
    notes = []
    with held(tmp_path, notes):
        assert (tmp_path / "train.lock").read_text().startswith(ME)
    assert len(notes) == 1 and "taken over from process 7 on elsewhere since 2026-01-01" in notes[0]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    notes = []
    with held(tmp_path, notes), held(tmp_path, notes):
        pass
    assert len(notes) == 2 and "has no locks; see to it that no other process writes there" in notes[0]


def test_an_object_store_is_claimed_and_the_process_before_finds_out(tmp_path):
    """Two processes that were not told of one another: the first ends before it writes, and the last one goes on."""
    notes, file = [], tmp_path / "run" / "train.lock"
    file.parent.mkdir()
    with bucket(tmp_path):
        with held("gs://bucket/run/", notes):
            assert len(notes) == 1 and "an object store has no locks" in notes[0]
            assert file.read_text().startswith(ME)
            check_claim("gs://bucket/run", LOCK)
            for text, words in (("process 1 on b since 2026, 0a\n", "process 1 on b since 2026;"), ("", "another")):
                file.write_text(text)
                with pytest.raises(ValueError, match=f"^gs://bucket/run: taken over by {words}.* stop one of the two$"):
                    check_claim("gs://bucket/run", LOCK)
            file.unlink()
            with pytest.raises(ValueError, match="taken over by another process, which has ended; "):
                check_claim("gs://bucket/run", LOCK)
            file.write_text("process 1 on b since 2026, 0a\n")
        assert file.read_text() == "process 1 on b since 2026, 0a\n"  # not ours to remove
        with held("gs://bucket/run", notes):
            assert "taken over from process 1 on b since 2026; if that process still runs, it ends" in notes[-1]
        assert not file.exists()
        check_claim("gs://bucket/run", LOCK)  # none of ours
    check_claim(str(tmp_path), LOCK)


def test_of_several_processes_the_first_holds_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(process_index=lambda: 1))
    with held(tmp_path):
        assert not list(tmp_path.iterdir())


def test_the_hosts_of_a_tpu_are_asked_and_no_one_else(monkeypatch):
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
    assert (processes.index(), processes.count()) == (0, 1) and "jax" not in sys.modules
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    third = types.SimpleNamespace(process_index=lambda: 2, process_count=lambda: 4)
    monkeypatch.setattr(builtins, "__import__", lambda *_: third)
    assert (processes.index(), processes.count()) == (2, 4)


def test_a_holder_that_ends_meanwhile(tmp_path, monkeypatch):
    """Its file is removed between our opening and our locking it: a lock on a file without a name keeps no one out."""
    original, removed = fcntl.flock, []

    def flock(file, how):
        if not removed:
            removed.append(os.unlink(tmp_path / "train.lock"))
        return original(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with held(tmp_path):
        with pytest.raises(ValueError, match="in use by"), held(tmp_path):
            pass


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is a file; give a folder"), held(path):
            pass


def test_programs_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--workdir={tmp_path}"])
    with held(tmp_path), pytest.raises(SystemExit) as stopped:
        train_program.main()
    message = capsys.readouterr()
    assert stopped.value.code == 2 and message.out == "" and message.err.count("\n") == 1
    assert f"--workdir {tmp_path}: in use by {ME}" in message.err
    with alone(str(tmp_path), "snr", "--out", print), pytest.raises(SystemExit) as stopped:
        reproduce.main(["snr", "--quick", "--out", str(tmp_path)])
    assert stopped.value.code == 2 and f"--out {tmp_path}: in use by {ME}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
