"""What the objectives' tests share: a corpus, and one cache for the runs that they prepare many times."""

import pytest
from support import training_cases as cases


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("corpus"))
