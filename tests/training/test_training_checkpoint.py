"""Checkpoints: what is damaged is found, what is whole comes back bit for bit, on another mesh too."""

import concurrent.futures
import errno
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from support import training_cases as cases

from deltaformer_jax.config import MeshConfig
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.checkpoints import checksums, store
from deltaformer_jax.training.checkpoints.checksums import CHECKSUMS, CheckpointError, check_checksums
from deltaformer_jax.training.checkpoints.store import Checkpoints, SaveError
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.state import TrainState


@pytest.fixture(scope="module")
def made():
    config = cases.small_config("", model__vocab_size=64, optimizer__clip_norm=0.0)
    program = Program(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    return config, program.abstract, program.create_state(config.run.seed)


def at_step(state: TrainState, step: int) -> TrainState:
    """Arrays of its own: a test may donate them."""
    return jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state)


@pytest.fixture
def saved(tmp_path, made):
    """A folder with checkpoints 1, 2 and 3."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(at_step(made[2], step), {"step": step, "next_batch": step})
    checkpoints.close()
    return tmp_path


def newest(folder, abstract):
    checkpoints, notes = Checkpoints(folder, keep=3), []
    try:
        return *checkpoints.restore_newest(abstract, notes.append), notes
    finally:
        checkpoints.close()


def test_comes_back_bit_for_bit(saved, made):
    state, run, notes = newest(saved, made[1])
    assert run["step"] == run["next_batch"] == 3 and notes == []
    cases.assert_same_bits(state, at_step(made[2], 3))
    assert not list(saved.glob("saving-*"))


def test_a_relative_folder(tmp_path, made, monkeypatch):
    _, abstract, state = made
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run/checkpoints")
    checkpoints.save(state, {"step": 1})
    checkpoints.close()
    assert checkpoints.path(1) == tmp_path / "run" / "checkpoints" / "1"
    cases.assert_same_bits(newest("run/checkpoints", abstract)[0], state)


def test_keeps_the_newest(tmp_path, made):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(at_step(made[2], step), {"step": step})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    checkpoints.close()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)


def test_any_flipped_byte_is_found(saved):
    draw = random.Random(0)
    files = [file for file in files_of(saved / "3") if file.stat().st_size]
    for file in files + draw.choices(files, k=100):
        original = file.read_bytes()
        damaged = bytearray(original)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{file.name}: corrupt"):
            check_checksums(epath.Path(saved / "3"))
        file.write_bytes(original)
    check_checksums(epath.Path(saved / "3"))


@pytest.mark.parametrize("damage", ["truncated", "deleted", "zeroed"])
def test_any_lost_file_is_found(saved, made, damage):
    for file in files_of(saved / "3"):
        original = file.read_bytes()
        if damage == "deleted":
            file.unlink()
        elif original:
            file.write_bytes(original[:-1] if damage == "truncated" else bytes(len(original)))
        if file.exists() and file.read_bytes() == original:
            continue  # it was empty
        with pytest.raises(CheckpointError, match=file.name):
            check_checksums(epath.Path(saved / "3"))
        file.write_bytes(original)
    check_checksums(epath.Path(saved / "3"))


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{}", b"\xff"])
def test_without_checksums_there_is_no_checkpoint(saved, made, content):
    path = saved / "3" / CHECKSUMS
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"sha256.json"):
        check_checksums(epath.Path(saved / "3"))


def test_goes_back_to_the_step_before_and_says_so(saved, made):
    victim = max(files_of(saved / "3"), key=lambda file: file.stat().st_size)
    victim.write_bytes(bytes(victim.stat().st_size))
    state, run, notes = newest(saved, made[1])
    assert run["step"] == 2
    cases.assert_same_bits(state, at_step(made[2], 2))
    assert len(notes) == 1 and victim.name in notes[0] and "step 2" in notes[0]


def test_none_whole_is_an_error_that_changes_nothing(saved, made):
    for step in "123":
        (saved / step / CHECKSUMS).write_text("{}")
    before = {file: file.read_bytes() for file in files_of(saved)}
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*another --workdir"):
        newest(saved, made[1])
    assert before == {file: file.read_bytes() for file in files_of(saved)}


def test_killed_before_the_checksums(saved, made):
    # As a process killed between orbax's last write and ours leaves it: the step before is whole, go back to it.
    (saved / "3" / CHECKSUMS).unlink()
    (saved / "saving-3").write_text("")
    # As one killed while orbax was writing: orbax warns of it, on stderr, when it saves that step again.
    (saved / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    checkpoints = Checkpoints(saved, keep=3)
    checkpoints.settle()
    assert checkpoints.steps() == [1, 2] and {path.name for path in saved.iterdir()} == {"1", "2"}
    # The only one: orbax had written all of it.
    checkpoints.drop_after(1)
    (saved / "1" / CHECKSUMS).unlink()
    (saved / "saving-1").write_text("")
    checkpoints.settle()
    checkpoints.close()
    state, run, _ = newest(saved, made[1])
    assert run["step"] == 1
    cases.assert_same_bits(state, at_step(made[2], 1))


def test_a_failed_save_is_said_once(saved, made, monkeypatch, tmp_path_factory):
    """On a full disk orbax fails in its own thread, and again at every later call: the first time is enough."""
    checkpoints = full(Checkpoints(saved, keep=3), monkeypatch)
    checkpoints.save(at_step(made[2], 1), {"step": 4})
    with pytest.raises(SaveError, match=r"4: not saved: No space left on device; the newest whole checkpoint is 3$"):
        checkpoints.wait()
    checkpoints.close()
    # Nobody was told yet: then closing says it.
    other = full(Checkpoints(tmp_path_factory.mktemp("other"), keep=3), monkeypatch)
    other.save(at_step(made[2], 1), {"step": 5})
    with pytest.raises(SaveError, match="5: not saved"):
        other.close()


def test_a_folder_that_another_process_took_over_is_left_alone(saved, made, monkeypatch):
    def taken(folder, name):
        raise ValueError(f"{folder}: {name}, taken over by process 1")

    monkeypatch.setattr(store, "check_claim", taken)
    before, checkpoints = files_of(saved), Checkpoints(saved, keep=3)
    with pytest.raises(SaveError, match=rf"4: not saved: {saved.parent}: train, taken over by process 1; the newest"):
        checkpoints.save(at_step(made[2], 1), {"step": 4})
    checkpoints.close()
    assert files_of(saved) == before


def full(checkpoints, monkeypatch):
    """`checkpoints`, as on a disk that is full once a save has begun."""
    manager = checkpoints._manager
    original, failed = manager.wait_until_finished, []

    def fail():
        original()
        if failed or threading.current_thread() is not threading.main_thread():
            failed.append(1)
            raise ValueError("a long story") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manager, "wait_until_finished", fail)
    return checkpoints


def test_another_dtype_or_shape_is_refused(saved, made):
    abstract = made[1]
    half = abstract._replace(params=jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), abstract.params))
    with pytest.raises(CheckpointError, match=r"float32.* in the checkpoint and .*bfloat16"):
        newest(saved, half)
    wide = abstract._replace(step=jax.ShapeDtypeStruct((1,), jnp.int32, sharding=abstract.step.sharding))
    with pytest.raises(CheckpointError, match="step is"):
        newest(saved, wide)


def test_written_on_one_device_loads_on_eight(saved, made):
    config, _, state = made
    program = Program(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    restored, _, _ = newest(saved, program.abstract)
    cases.assert_same_bits(restored, at_step(state, 3))
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(program.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_a_save_is_of_the_moment_it_was_asked_for(tmp_path, made):
    """The state's memory is given to the next step while orbax is still writing."""
    _, abstract, state = made
    state = at_step(state, 1)
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, {"step": 1})
    for _ in range(3):
        state = overwrite(state)
    checkpoints.close()
    cases.assert_same_bits(newest(tmp_path, abstract)[0], expected)


def test_drop_after(saved):
    checkpoints = Checkpoints(saved, keep=3)
    checkpoints.drop_after(1)
    assert checkpoints.steps() == [1]
    checkpoints.close()


def test_each_process_hashes_what_it_wrote(tmp_path, monkeypatch):
    """Together each file once, at saving and at restoring, also if fewer or more processes go on."""
    folder, here = epath.Path(tmp_path / "7"), threading.local()
    mine = [f"state/ocdbt.process_{i}/d/{name}" for i in range(4) for name in ("a", "b")]
    names = [*mine, "state/_METADATA", "state/d/c", "run/metadata", "state/manifest.ocdbt", "commit_success.txt"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    hashed = []
    really = checksums._sha256
    monkeypatch.setattr(checksums, "_sha256", lambda path: (hashed.append((here.index, path)), really(path))[1])
    monkeypatch.setattr(checksums.processes, "index", lambda: here.index)

    def together(count, function):
        """function(folder) of `count` processes at once. Returns who hashed which file."""
        told, barrier = [None] * count, threading.Barrier(count)

        def gather(_, value):
            told[here.index] = value
            barrier.wait(10)
            return told

        monkeypatch.setattr(checksums.processes, "count", lambda: count)
        monkeypatch.setattr(checksums.common, "gather", gather)
        monkeypatch.setattr(checksums.common, "first", lambda _, function: function())
        hashed.clear()

        def process(index):
            here.index = index
            function(folder)

        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            list(pool.map(process, range(count)))
        assert sorted(str(path) for _, path in hashed) == sorted(str(folder / name) for name in names)
        return {path.relative_to(folder).as_posix(): index for index, path in hashed}

    written = together(4, checksums.write_checksums)
    assert {name: written[name] for name in mine} == {name: i // 2 for i, name in enumerate(mine)}
    for count in (1, 2, 3, 4, 6):
        read = together(count, checksums.check_checksums_together)
        assert {name: read[name] for name in mine} == {name: i // 2 % count for i, name in enumerate(mine)}
    (folder / mine[5]).write_text("damaged")
    with pytest.raises(CheckpointError, match=f"{mine[5]}: corrupt"):  # all raise, whoever has read it
        together(2, checksums.check_checksums_together)
