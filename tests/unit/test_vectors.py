"""Word vectors from every format that is taken, and those that are not."""

import gzip
from pathlib import Path

import gensim
import numpy as np
import pytest
from gensim.models import KeyedVectors

from ray_jobs.core.errors import ModelError
from ray_jobs.judging.vectors import check_vectors, load_vectors

ROWS = {"the": [1.0, 2.0, 3.0], "base": [0.5, -1.0, 0.25], "größe": [4.0, 0.0, -2.0]}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def keyed():
    vectors = KeyedVectors(3)
    vectors.add_vectors(list(ROWS), np.array(list(ROWS.values()), dtype=np.float32))
    return vectors


def glove_lines():
    return "".join(f"{word} {' '.join(map(str, row))}\n" for word, row in ROWS.items())


def check_rows(found):
    assert found.keyed.index_to_key == list(ROWS)
    for word, row in ROWS.items():
        np.testing.assert_array_equal(found.keyed[word], row)
    assert len(found.sha256) == 64


def test_glove_text(tmp_path, own_cache):
    (tmp_path / "v.txt").write_text(glove_lines(), encoding="utf-8")
    check_rows(load_vectors(str(tmp_path / "v.txt")))


def test_compressed_glove_text(tmp_path, own_cache):
    (tmp_path / "v.txt.gz").write_bytes(gzip.compress(glove_lines().encode()))
    check_rows(load_vectors(str(tmp_path / "v.txt.gz")))


def test_word2vec_text_and_binary_and_gensims_own(tmp_path, keyed, own_cache):
    keyed.save_word2vec_format(str(tmp_path / "v.vec"))
    keyed.save_word2vec_format(str(tmp_path / "v.bin"), binary=True)
    keyed.save(str(tmp_path / "v.kv"))
    for name in ("v.vec", "v.bin", "v.kv"):
        check_rows(load_vectors(str(tmp_path / name)))


def test_fasttexts_own_binary_gives_its_words(own_cache):
    from gensim.models.fasttext import load_facebook_vectors

    path = Path(gensim.__file__).parent / "test" / "test_data" / "lee_fasttext_new.bin"
    if not path.exists():
        pytest.skip("this gensim comes without its test data")
    found, own = load_vectors(str(path)).keyed, load_facebook_vectors(str(path))
    assert found.index_to_key == own.index_to_key and "xyzzyx" not in found
    np.testing.assert_array_equal(found["the"], own["the"])


def test_a_file_is_converted_once_and_mapped(tmp_path, own_cache):
    path = tmp_path / "v.txt"
    path.write_text(glove_lines(), encoding="utf-8")
    load_vectors(str(path))
    converted = list((tmp_path / "cache" / "vectors").glob("v-*/vectors.kv"))
    before = converted[0].stat().st_mtime_ns
    again = load_vectors(str(path))
    assert converted[0].stat().st_mtime_ns == before
    assert isinstance(again.keyed.vectors, np.memmap)


def test_the_embedded_vectors_know_english():
    found = load_vectors("glove-6b-50d")
    assert found.keyed.vectors.shape == (400_000, 50)
    assert found.keyed.index_to_key[0] == "the"
    assert found.keyed.similarity("kernel", "unix") > found.keyed.similarity("kernel", "banana")
    assert isinstance(found.keyed.vectors, np.memmap)


def test_a_broken_gensim_file_is_refused(tmp_path):
    (tmp_path / "v.kv").write_bytes(b"not a pickle")
    with pytest.raises(ModelError, match=r"v\.kv.*cannot be read"):
        load_vectors(str(tmp_path / "v.kv"))


@pytest.mark.parametrize("content", [b"", b"just one\nbroken file here\n", b"\xff\xfe\x00\x01"])
def test_a_file_without_vectors_is_refused(tmp_path, own_cache, content):
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(ModelError, match=r"v\.txt.*cannot be read"):
        load_vectors(str(tmp_path / "v.txt"))


def test_a_missing_name_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match=r"'glove-7b' are no built-in name \(glove-6b-50d\), not 'course', and no file"):
        check_vectors("glove-7b")
