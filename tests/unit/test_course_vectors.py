"""Vectors trained on the course: the same bits each time, once, with true counts, and for its own language."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from ray_jobs.core.errors import DataError
from ray_jobs.judging.course_vectors import sentences, train
from ray_jobs.judging.vectors import course_vectors

TEXTS = [f"Der Kern verwaltet Prozess {i}. Die Seite {i} liegt im Rahmen {i % 7}; a page is in a frame." for i in range(80)]
HASHED = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from test_course_vectors import TEXTS
from ray_jobs.judging.course_vectors import sentences, train
print(hashlib.sha256(train(sentences(TEXTS), seed=3).vectors.tobytes()).hexdigest())
"""


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vectors"


def test_sentences_end_where_they_end():
    assert sentences(["One page. Two\nthree? 4.5 GB!", "..."]) == [["one", "page"], ["two"], ["three"], ["4", "5", "gb"]]


def test_another_process_trains_the_same_bits(request):
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}
    command = [sys.executable, "-c", HASHED, str(request.path.parent)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert told.strip() == hashlib.sha256(train(sentences(TEXTS), seed=3).vectors.tobytes()).hexdigest()


def test_another_seed_gives_other_vectors():
    corpus = sentences(TEXTS)
    assert not np.array_equal(train(corpus, seed=3).vectors, train(corpus, seed=4).vectors)


def test_they_are_trained_once_mapped_and_know_the_words_and_their_counts(own_cache):
    found = course_vectors(TEXTS, seed=0)
    [file] = own_cache.glob("course-*/vectors.kv")
    before = file.stat().st_mtime_ns
    again = course_vectors(iter(TEXTS), seed=0)
    assert file.stat().st_mtime_ns == before and again.sha256 == found.sha256
    assert isinstance(again.keyed.vectors, np.memmap)
    assert "rahmen" in again.keyed and again.keyed.get_vecattr("kern", "count") == 80
    assert course_vectors(TEXTS, seed=1).sha256 != found.sha256


def test_too_little_text_is_refused_with_the_way_out(own_cache):
    with pytest.raises(DataError, match=r"has 3 words to learn from, at least 1000"):
        course_vectors(["Just three words."], seed=0)
