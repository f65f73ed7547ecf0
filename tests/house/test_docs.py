"""Every Python example in README.md and docs/, and every notebook, runs as it stands there.

Examples that need files begin with "``` python", with a space; test_own_mixers.py, test_old_runs.py and
test_interop_layers.py run those.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


def test_there_are_examples():
    assert len(EXAMPLES) >= 6
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
    need_files = {name: len(re.findall(r"^``` python\n", text, re.M)) for name, text in pages.items()}
    assert {name: count for name, count in need_files.items() if count} == {
        "checkpoints.md": 2,
        "own_mixers.md": 1,
        "weights.md": 2,
    }


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs_and_has_the_shape_it_says(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what it writes
    names = {}
    exec(code, names)
    for name, shape in re.findall(r"^(\w+)(?:, _)? = .*  # (\[[\d, ]+\])$", code, re.M):
        assert list(names[name].shape) == eval(shape), name


NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
TRAINING = {"swap_tracking": "steps=400", "own_mixer": "steps=150"}  # of which the tests make 20


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.long] if path.stem in TRAINING else [], id=path.stem) for path in NOTEBOOKS],
)
def test_notebook_runs(path, monkeypatch):
    """The cells in their order, in one namespace; what they print is not compared, since it differs by machine."""
    text = path.read_text(encoding="utf-8")
    if steps := TRAINING.get(path.stem):
        assert text.count(steps) == 1
        text = text.replace(steps, "steps=20")
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(text)["cells"]
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 3


def test_the_tests_that_docs_name_exist():
    text = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    files = set(re.findall(r"test_\w+\.py", text))
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(there.values()), re.M))
    assert len(files) > 10 and files <= there.keys(), files - there.keys()
    named = set(re.findall(r"::(test_\w+)", text))
    assert named <= defined, named - defined
