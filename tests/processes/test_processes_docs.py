"""The launch lines of docs/clusters.md: their syntax, and that what they set is what is read."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from deltaformer_jax.config.command_line import _check_flags
from deltaformer_jax.processes.place import ASKED

PAGE = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|yaml)\n(.*?)^```", PAGE, re.M | re.S)
BASH = [text for language, text in BLOCKS if language == "bash"]
YAML = [document for language, text in BLOCKS if language == "yaml" for document in yaml.safe_load_all(text)]
BASH += [document["run"] for document in YAML if "run" in document]


def test_all_are_found():
    assert len(BASH) >= 6 and len(YAML) == 3


@pytest.mark.parametrize("text", BASH)
def test_bash_has_no_error_of_syntax(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, capture_output=True)


def test_the_variables_are_those_that_are_read():
    known = {variable for _, variable in ASKED.values()} | {
        "JAX_PLATFORMS",
        "JAX_NUM_CPU_DEVICES",
        "JAX_LOCAL_DEVICE_IDS",
    }
    assert set(re.findall(r"\bJAX_[A-Z_]+", PAGE)) == known
    (job,) = [document for document in YAML if document.get("kind") == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {entry["name"] for entry in container["env"]} == {variable for _, variable in ASKED.values()}
    count = next(entry["value"] for entry in container["env"] if entry["name"] == "JAX_NUM_PROCESSES")
    assert int(count) == job["spec"]["completions"] == job["spec"]["parallelism"]
    _check_flags(container["command"][1:])


def test_the_flags_are_those_of_train():
    commands = re.findall(r"python train\.py([^\n'\"`#]*)", PAGE.replace("\\\n", " "))
    assert len(commands) >= 8
    for command in commands:
        _check_flags(["train.py", *shlex.split(command)])
