"""Similarities against gensim's own, a plain reading of the papers, and what must never become a number."""

import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from gensim.models import KeyedVectors

from ray_jobs.core.storage import Storage
from ray_jobs.judging.pooling import pool, unit, word_probabilities, words
from ray_jobs.judging.scales import MOST_WRONG_PAIRS, wrong_pairs
from ray_jobs.judging.similarity import METRICS, cos_winner, score_answers
from ray_jobs.judging.vectors import load_vectors
from ray_jobs.judging.word_overlap import content_words, token_f1

COURSE = Path(__file__).parents[2] / "ray_jobs" / "datasets" / "os_course"
WORDS = "the of memory register base limit process page kernel adds checks every address stack heap thread lock disk file block".split()


@pytest.fixture(scope="module")
def vectors():
    keyed = KeyedVectors(16)
    keyed.add_vectors(WORDS, np.random.default_rng(0).normal(size=(len(WORDS), 16)).astype(np.float32))
    return keyed


def question(id_, reference):
    return {"question_id": id_, "question": "?", "reference": reference}


def answer(id_, text, *, model="base", finish_reason="stop", error=""):
    row = {"answer_id": f"{model}-{id_}", "question_id": id_, "model": model, "text": text}
    return {**row, "finish_reason": finish_reason, "error": error}


def random_text(generator, size=30):
    return " ".join(generator.choice(WORDS, size))


@pytest.fixture(scope="module")
def course():
    generator = np.random.default_rng(1)
    questions = [question(str(i), random_text(generator)) for i in range(20)]
    return questions, [answer(q["question_id"], random_text(generator)) for q in questions]


def test_words_are_lower_case_without_punctuation():
    assert words("The base-register, e.g. Größe 64; isn't_it?") == ["the", "base", "register", "e", "g", "größe", "64", "isn", "t", "it"]


def test_cosine_equals_gensims_n_similarity(course, vectors):
    questions, answers = course
    rows, _ = score_answers(questions, answers, vectors, min_known_share=0.5)
    expected = [vectors.n_similarity(words(a["text"]), words(q["reference"])) for q, a in zip(questions, answers, strict=True)]
    np.testing.assert_allclose([row.cosine for row in rows], expected, atol=1e-6)


def test_cosine_equals_gensims_on_the_real_vectors():
    glove = load_vectors("glove-6b-50d").keyed
    rows = Storage(str(COURSE)).read_jsonl("questions.jsonl")[:40]
    questions = [question(str(i), row["reference"]) for i, row in enumerate(rows)]
    answers = [answer(str(i), rows[i - 1]["reference"] + " Zzyzzx!") for i in range(len(rows))]
    found, _ = score_answers(questions, answers, glove, min_known_share=0.5)
    scored = [(row.cosine, words(a["text"]), words(q["reference"])) for row, q, a in zip(found, questions, answers, strict=True)]
    expected = [(cosine, glove.n_similarity(one, two)) for cosine, one, two in scored if cosine is not None]
    assert len(expected) > 20
    np.testing.assert_allclose(*zip(*expected, strict=True), rtol=0, atol=1e-6)


def test_soft_cosine_is_gensims(course, vectors):
    from gensim.corpora import Dictionary
    from gensim.similarities import SparseTermSimilarityMatrix, WordEmbeddingSimilarityIndex

    questions, answers = course
    texts = [words(q["reference"]) for q in questions] + [words(a["text"]) for a in answers]
    dictionary = Dictionary(texts)
    matrix = SparseTermSimilarityMatrix(WordEmbeddingSimilarityIndex(vectors), dictionary, nonzero_limit=None)
    rows, _ = score_answers(questions, answers, vectors, min_known_share=0.5)
    for row, q, a in zip(rows, questions, answers, strict=True):
        one, two = (dictionary.doc2bow(words(text)) for text in (a["text"], q["reference"]))
        assert row.soft_cosine == pytest.approx(matrix.inner_product(one, two, normalized=(True, True)), abs=1e-5)


def test_content_words_are_those_of_the_language():
    assert content_words(words("The page isn't in the frame 7"), "en") == ["page", "not", "frame", "7"]
    assert content_words(words("Die Seite liegt nicht im Rahmen, z.B. 7"), "de") == ["seite", "liegt", "nicht", "rahmen", "7"]
    assert content_words(["die", "page"], "en") == ["die", "page"]
    assert content_words(["la", "page"], "fr") == ["la", "page"]


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("The system of the computer empties the full buffer first.", "Das System des Computers leert den vollen Puffer zuerst."),
        ("The scheduler is not preemptive.", "Der Scheduler ist nicht präemptiv."),
        ("The scheduler isn't preemptive.", "Der Scheduler ist nicht präemptiv."),
        ("No page without a frame, and never two.", "Keine Seite ohne einen Rahmen, und nie zwei."),
    ],
)
def test_both_languages_keep_the_terms_of_the_course_and_what_denies(english, german):
    kept = [content_words(words(text), language) for text, language in ((english, "en"), (german, "de"))]
    assert len(kept[0]) == len(kept[1]), kept


def test_letters_that_come_in_parts_make_the_same_words():
    german = "Größe der Übergangstabelle"
    assert words(unicodedata.normalize("NFD", german)) == words(german) == ["größe", "der", "übergangstabelle"]
    assert words("Seiten\u00adtabelle") == ["seitentabelle"]


def test_content_overlap_leaves_function_words_out(vectors):
    rows, _ = score_answers([question("1", "the page of the disk")], [answer("1", "the lock of the disk")], vectors, min_known_share=0)
    assert rows[0].token_f1 == pytest.approx(0.8) and rows[0].content_f1 == pytest.approx(0.5)


def test_an_answer_of_function_words_shares_no_content_and_a_sample_answer_of_them_asks_for_none(vectors):
    questions = [question("1", "memory base"), question("2", "of the")]
    rows, _ = score_answers(questions, [answer("1", "of the"), answer("2", "memory")], vectors, min_known_share=0)
    assert (rows[0].content_f1, rows[1].content_f1) == (0.0, None)


def test_german_overlap_is_scored_where_the_vectors_know_nothing(vectors):
    asked = {**question("1", "Die Seitentabelle bildet Seiten auf Rahmen ab."), "language": "de"}
    rows, _ = score_answers([asked], [answer("1", "Seiten werden auf Rahmen abgebildet.")], vectors, min_known_share=0.5)
    assert rows[0].cosine is None and "have a vector" in rows[0].reason
    assert 0 < rows[0].content_f1 < 1


def test_every_metric_has_its_scale_and_the_right_sample_answer_is_nearer(course, vectors):
    questions, _ = course
    rows, scales = score_answers(questions, [answer(q["question_id"], q["reference"]) for q in questions], vectors, min_known_share=0.5)
    assert tuple(scales) == METRICS
    for metric, scale in scales.items():
        assert scale.right_mean == pytest.approx(np.mean([getattr(row, metric) for row in rows]))
        assert scale.wrong_mean < scale.right_mean and scale.spread > 0


def test_wrong_pairs_are_of_another_question_in_the_same_language():
    right = np.repeat(np.arange(40), 3)
    languages = ["en", "de"] * 20
    answers, references = wrong_pairs(right, languages)
    assert len(answers) == 120 * 19 == len(set(zip(answers.tolist(), references.tolist(), strict=True)))
    assert all(right[a] != r and right[a] % 2 == r % 2 for a, r in zip(answers, references, strict=True))
    many = wrong_pairs(np.arange(3000), ["en"] * 3000)
    assert many.shape == (2, MOST_WRONG_PAIRS) and (many[0] != many[1]).all()
    assert wrong_pairs(np.array([0]), ["en"]).shape == wrong_pairs(np.zeros(0, int), []).shape == (2, 0)


def test_true_counts_weigh_words_and_made_up_ones_do_not(vectors):
    counted = KeyedVectors(2)
    counted.add_vectors(["a", "b", "c"], np.eye(3, 2, dtype=np.float32) + 1)
    ids = np.array([0, 2])
    by_rank = word_probabilities(counted, ids)
    counted.expandos["count"] = np.array([3, 2, 1])  # gensim's own, for a file without counts
    np.testing.assert_array_equal(word_probabilities(counted, ids), by_rank)
    counted.expandos["count"] = np.array([70, 20, 10])
    np.testing.assert_allclose(word_probabilities(counted, ids), [0.7, 0.1])


def test_cosine_ignores_unknown_words_as_gensim_does(vectors):
    text = "the xylophone checks every quokka address"
    rows, _ = score_answers([question("1", "memory base limit")], [answer("1", text)], vectors, min_known_share=0.5)
    assert rows[0].cosine == pytest.approx(vectors.n_similarity(words(text), ["memory", "base", "limit"]), abs=1e-6)
    assert rows[0].oov_share == pytest.approx(2 / 6)
    assert rows[0].num_tokens == 6


def sif_by_the_paper(questions, answers, vectors):
    """Arora et al. 2017, algorithm 1, word by word; the component from the sample answers."""
    total = sum(1 / rank for rank in range(1, len(WORDS) + 1))

    def embed(text):
        weights = [1e-3 / (1e-3 + 1 / ((vectors.key_to_index[w] + 1) * total)) for w in words(text)]
        return np.mean([weight * vectors[w].astype(float) for weight, w in zip(weights, words(text), strict=True)], axis=0)

    references = np.stack([embed(q["reference"]) for q in questions])
    component = np.linalg.eigh(references.T @ references)[1][:, -1]
    scores = []
    for row, reference in zip(answers, references, strict=True):
        x, y = (v - component * (component @ v) for v in (embed(row["text"]), reference))
        scores.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    return scores


def test_sif_follows_the_paper(course, vectors):
    questions, answers = course
    rows, _ = score_answers(questions, answers, vectors, min_known_share=0.5)
    # the harmonic number is taken as log n + gamma, which for 20 words is 0.7% off
    np.testing.assert_allclose([row.sif_cosine for row in rows], sif_by_the_paper(questions, answers, vectors), atol=5e-3)


def test_one_more_model_changes_no_score(course, vectors):
    questions, answers = course
    alone, _ = score_answers(questions, answers, vectors, min_known_share=0.5)
    others = [answer(q["question_id"], "lock disk file " * 9, model="other") for q in questions]
    together, _ = score_answers(questions, answers + others, vectors, min_known_share=0.5)
    assert [row.model_dump() for row in together[: len(alone)]] == [row.model_dump() for row in alone]


def test_the_sample_answer_itself_scores_one(course, vectors):
    questions, _ = course
    rows, scales = score_answers(questions, [answer(q["question_id"], q["reference"]) for q in questions], vectors, min_known_share=0.5)
    for row in rows:
        assert (row.cosine, row.sif_cosine, row.token_f1) == (pytest.approx(1), pytest.approx(1), 1.0)
    assert scales["cosine"].right_mean == pytest.approx(1)


def test_scale_comes_from_the_wrong_sample_answers(course, vectors):
    questions, answers = course
    _, scales = score_answers(questions, answers, vectors, min_known_share=0.5)
    wrong = [
        float(vectors.n_similarity(words(a["text"]), words(q["reference"])))
        for a in answers
        for q in questions
        if q["question_id"] != a["question_id"]
    ]
    low, high = np.percentile(wrong, [5, 95])
    assert scales["cosine"].wrong_mean == pytest.approx(np.mean(wrong), abs=1e-6)
    assert scales["cosine"].spread == pytest.approx(high - low, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        ("", {}, "empty answer"),
        (" ...! ", {}, "empty answer"),
        ("quokka xylophone", {}, "0% of the answer's words"),
        ("quokka xylophone kiwi the", {}, "25% of the answer's words"),
        ("the base register", {"finish_reason": "error", "error": "out of memory"}, "answer failed: out of memory"),
    ],
)
def test_no_score_is_a_reason_and_never_zero(vectors, text, changes, reason):
    questions = [question("1", "memory base limit"), question("2", "page kernel")]
    rows, _ = score_answers(questions, [answer("1", text, **changes), answer("2", "page lock")], vectors, min_known_share=0.5)
    assert rows[0].cosine is None and rows[0].sif_cosine is None
    assert reason in rows[0].reason
    assert rows[1].cosine is not None and rows[1].reason == ""


def test_an_unknown_sample_answer_gives_no_score(vectors):
    questions = [question("1", "größere seiten verringern"), question("2", "page kernel")]
    rows, scales = score_answers(questions, [answer("1", "the memory page")], vectors, min_known_share=0.5)
    assert rows[0].cosine is None
    assert "0% of the sample answer's words" in rows[0].reason
    assert rows[0].token_f1 == 0.0
    assert (scales["cosine"].right_mean, scales["cosine"].spread) == (None, 0.0)


def test_one_question_has_a_cosine_but_no_sif_and_no_scale(vectors):
    rows, scales = score_answers([question("1", "memory base")], [answer("1", "memory limit")], vectors, min_known_share=0.5)
    assert rows[0].cosine is not None and rows[0].sif_cosine is None
    assert (scales["cosine"].wrong_mean, scales["cosine"].spread) == (None, 0.0)


def test_no_answers_and_no_known_word_at_all(vectors):
    assert score_answers([question("1", "quokka")], [], vectors, min_known_share=0.5)[0] == []
    assert pool([["quokka"], []], vectors).mean_ND.shape == (2, 16)
    assert np.isnan(unit(np.zeros((1, 3)))).all()


def test_token_f1_counts_repetitions():
    a, b = "the page the frame".split(), "the page table".split()
    common = sum((Counter(a) & Counter(b)).values())
    precision, recall = common / 4, common / 3
    assert token_f1(a, b) == pytest.approx(2 * precision * recall / (precision + recall))
    assert token_f1(a, ["disk"]) == 0.0


@pytest.mark.parametrize(
    ("a", "b", "winner"),
    [
        (0.95, 0.94, "a"),
        (0.94, 0.95, "b"),
        (0.9410, 0.9405, "tie"),
        (0.941656, 0.918323, "a"),
        (None, 0.9, None),
        (0.9, None, None),
    ],
)
def test_cos_winner_has_a_tie_band(a, b, winner):
    assert cos_winner(a, b, tie_band=0.001) == winner


def test_swapping_swaps_the_cos_winner():
    generator = np.random.default_rng(0)
    other = {"a": "b", "b": "a", "tie": "tie"}
    for x, y in generator.uniform(size=(50, 2)):
        assert cos_winner(x, y, tie_band=0.1) == other[cos_winner(y, x, tie_band=0.1)]
