"""Folders: each file is read once by whatever links it is found, and what is no file to read is named."""

import os
import socket

import pytest

from deltaformer_jax.data import prepare_corpus
from deltaformer_jax.data.prepare import main
from deltaformer_jax.data.sources import open_source


def texts_of(folder):
    return [text for unit in open_source(folder).units() for text in unit.documents()]


def test_links_are_followed_once_and_what_is_no_file_is_named(tmp_path, capsys):
    store, root = tmp_path / "store", tmp_path / "in"
    for folder in (store / "deep", root / "own"):
        folder.mkdir(parents=True)
    (store / "deep" / "one.txt").write_text("one")
    (store / "blob").write_text("two")
    (root / "own" / "three.txt").write_text("three")
    (root / "own" / "picture.png").write_text("no text")
    links = {
        "linked": store,  # a folder outside
        "again": store / "deep",  # which is in it
        "file.txt": store / "blob",  # a name of a known kind for a file without one
        "twice.txt": store / "blob",
        "zero.txt": root / "own" / "three.txt",
        "own/loop": root,
        "nothing.txt": root / "none",
        "round.txt": root / "round.txt",
        "device.txt": "/dev/zero",
    }
    for name, target in links.items():
        os.symlink(target, root / name)
    os.mkfifo(root / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(root)  # a socket's path is short
        bound.bind("socket.txt")
        os.chdir(here)
    source = open_source(root)
    assert sorted(texts_of(root)) == ["one", "three", "two"]
    left = dict(source.left_out)
    assert left == {
        "linked/deep": "another name of what is read",  # "again" is sorted before "linked"
        "twice.txt": "another name of what is read",
        "zero.txt": "another name of what is read",
        "own/loop": "another name of what is read",
        "linked/blob": "of another kind",
        "own/picture.png": "of another kind",
        "nothing.txt": "a link to nothing",
        "round.txt": "a loop of links",
        "device.txt": "a device",
        "pipe.txt": "a named pipe",
        "socket.txt": "a socket",
    }
    assert main([str(root), "--out", str(tmp_path / "out"), "--eval_fraction", "0"]) == 0
    assert f"left out {len(left)} files" in capsys.readouterr().out
    assert (tmp_path / "out" / "left_out.txt").read_text().splitlines() == [f"{a}: {b}" for a, b in source.left_out]


def test_what_may_not_be_opened_is_named(tmp_path, monkeypatch):
    for name in ("a.txt", "secret.txt", "closed/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    really, scan = os.access, os.scandir
    monkeypatch.setattr(os, "access", lambda path, mode: "secret" not in str(path) and really(path, mode))

    def scandir(path):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert texts_of(tmp_path) == ["a.txt"]
    assert open_source(tmp_path).left_out == [("closed/", "Permission denied"), ("secret.txt", "Permission denied")]


def test_names_of_any_bytes(tmp_path, capsys):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for name in (b"\xff.txt", b"two\nlines.txt", b"a b.txt", b"\xff.png"):
        with open(folder + b"/" + name, "w") as file:
            file.write("text of " + repr(name))
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--eval_fraction", "0"]) == 0
    assert "train 3 documents" in " ".join(capsys.readouterr().out.split())
    with open(folder + b"/two\nlines.txt", "wb") as file:
        file.write(b"\xff")
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_pipe_or_device_by_itself(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt: is a pipe, and learning bpe:300 reads it twice"):
        prepare_corpus(tmp_path / "pipe.txt", tmp_path / "out", tokenizer="bpe:300")
    os.symlink("/dev/zero", tmp_path / "zero.txt")
    with pytest.raises(ValueError, match=r"zero\.txt: is a device, not a file"):
        prepare_corpus(tmp_path / "zero.txt", tmp_path / "out")
