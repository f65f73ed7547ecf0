"""A program of several processes that computes nothing, so that what its supervisors do takes seconds to test.

    python toy_program.py FOLDER BEHAVIOUR --coordinator ... --processes N --process I

BEHAVIOUR, of this process, once all have met: works (until a signal asks it to end), hangs, saves (is busy for long
without a word), fails (with a line), breaks (with a traceback), leaves (with code 7), never (comes to the meeting),
aborts (as jax does, with a trace, when another process is gone: a second after the others have met), early (fails with
a line before they meet).
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.processes import child
from deltaformer_jax.processes.place import find
from deltaformer_jax.processes.supervisor import supervise

LIMIT = 2.0  # seconds of training without a sign of life


def main():
    place = child.supervised() or find(sys.argv, os.environ)
    if child.supervised() is None:
        supervise(place, "toy")
    folder, behaviour = Path(sys.argv[1]), sys.argv[2]
    with child.last_words(lambda: meet(place, folder)):
        program(place, folder, behaviour)


def program(place, folder, behaviour):
    asked = threading.Event()
    child.tell(workdir=str(folder))
    child.at("connecting", LIMIT if behaviour == "never" else 60)
    while behaviour == "never":
        time.sleep(1)
    if behaviour == "early":
        with one_line_errors("toy"):
            raise ValueError("what is wrong")
    meet(place, folder)
    with child.forwarded(lambda number: asked.set()), one_line_errors("toy"):
        begin = time.monotonic()
        while not asked.wait(0.05):
            late = time.monotonic() > begin + 1.0
            child.at("training", LIMIT)
            if late and behaviour == "hangs":
                time.sleep(100)
            if late and behaviour == "saves":
                with child.taking_time("saving"):
                    asked.wait(100)
                break
            if late and behaviour == "fails":
                raise ValueError("what is wrong")
            if late and behaviour == "breaks":
                raise RuntimeError("a bug")
            if late and behaviour == "leaves":
                os._exit(7)
            if late and behaviour == "aborts":
                print("F1128 10:53:37.518613 7469 client.h:80] Terminating\n*** Check failure", file=sys.stderr)
                sys.stderr.flush()
                os.abort()
    child.at("ending", 0)
    print("ended well", flush=True)


def meet(place, folder):
    """What jax's coordinator does in a real program."""
    hub = folder / "hub.json"
    if place.index == 0:
        told = child.where_the_parent_listens()
        (folder / "part").write_text(json.dumps(told))
        (folder / "part").rename(hub)
    (folder / f"came-{place.index}").write_text(str(os.getpid()))
    while len(list(folder.glob("came-*"))) < place.count or not hub.exists():
        time.sleep(0.02)
    child.connected(json.loads(hub.read_text()))


if __name__ == "__main__":
    main()
