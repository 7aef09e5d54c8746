"""Answers compared with references: golden values, equality with sacrebleu and rouge-score, and intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from tasks.generation import METRICS
from tasks.intervals import DRAWS, SEED, TOGETHER, drawn_ratios
from tasks.measurements import Measure
from tasks.text_metrics import BY_ROW, corpus_score, is_chinese, measure_answers, row_scores, token_f1, words

PAIRS = [
    ("The cat sat on the mat.", "The cat is on the mat."),
    ("Paris is the capital of France", "The capital of France is Paris."),
    ("", "Nothing was said here at all."),
    ("I do not know, but 3.14 is close to pi - nearly.\n", "3.14 is close to pi."),
    ("A long answer that goes on and on and on about nothing", "No."),
    ("Tom & Jerry: &quot;run!&quot;", 'Tom & Jerry: "run!"'),
    ("naïve café, déjà vu", "Naive cafe, deja vu"),
]
CHINESE = [
    ("北京是中国的首都。", "中国的首都是北京。"),
    ("我不知道。", "用 Python 3 写一个函数。"),
    ("用 python 3 写函数", "用 Python 3 写一个函数。"),
    ("今天天气很好", "今天天气很好"),
]


def texts(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [answer for answer, _ in pairs], [reference for _, reference in pairs]


def compare(pairs: list[tuple[str, Any]]) -> dict[str, Measure]:
    answers, references = [answer for answer, _ in pairs], [reference for _, reference in pairs]
    return measure_answers(answers, references, [len(answer) for answer in answers], [True] * len(answers)).measures


def value(pairs: list[tuple[str, Any]], metric: str) -> float:
    return float(compare(pairs)[metric].result["value"])


def test_bleu_is_the_geometric_mean_of_the_precisions() -> None:
    # 7 words each, "sat" instead of "is": 6 of 7 words, 4 of 6 pairs, 2 of 5 triples, 1 of 4 fours are there
    found = value([("The cat sat on the mat.", "The cat is on the mat.")], "bleu")
    assert found == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25, rel=1e-12)
    assert value([("a b c d", "a b c d e")], "bleu") == pytest.approx(100 * math.exp(1 - 5 / 4))  # the brevity penalty
    assert value([("x y", "a b")], "bleu") == 0


def test_chrf_is_the_mean_f2_of_orders_of_characters() -> None:
    # "abc" and "abd": 2 of 3 characters, 1 of 2 pairs, 0 of 1 triples, precision and recall alike
    assert value([("abc", "abd")], "chrf") == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert value([("same", "same")], "chrf") == pytest.approx(100)


def test_rouge_is_the_mean_f_measure_of_rows() -> None:
    first = ("the cat sat on the mat", "the cat is on the mat")
    scores = {"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6}
    found = compare([first, ("x", "y")])
    for name, score in scores.items():
        assert found[name].result["value"] == pytest.approx(score / 2)
        assert found[name].result["rows"] == 2
    assert row_scores([("b a", "a b")], chinese=False)[0]["rougeL"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("answer", "reference", "chinese", "score"),
    [
        ("It is Paris.", "paris", False, 1 / 2),
        ("The cat!", "a cat", False, 1.0),
        ("cat cat dog", "cat dog dog", False, 2 / 3),
        ("cat", "dog", False, 0.0),
        ("the", "...", False, 1.0),  # nothing is left of either
        ("the", "cat", False, 0.0),
        ("", "", False, 1.0),
        ("中国", "中文", True, 1 / 2),
        ("。", "，", True, 1.0),
        ("用Python3", "用 python3。", True, 1.0),
    ],
)
def test_f1_counts_the_words_that_both_have(answer: str, reference: str, chinese: bool, score: float) -> None:
    assert token_f1(answer, reference, chinese) == pytest.approx(score)


def test_words_are_those_of_squad_and_every_han_character_is_one() -> None:
    assert words("The U.S. isn't  a\nthe-orem_x, AN ant") == ["us", "isnt", "theoremx", "ant"]
    assert words("我爱C++和Python_3，𠀀！", chinese=True) == ["我", "爱", "c", "和", "python", "3", "𠀀"]


def test_an_answer_is_exact_but_for_white_space_around_it() -> None:
    assert value([(" yes\n", "yes"), ("Yes", "yes"), ("yes.", "yes"), ("no", "\tno")], "exact_match") == 0.5


def test_values_of_the_libraries_are_kept_exactly() -> None:
    answers, references = texts(PAIRS)
    found = compare(PAIRS)
    assert found["bleu"].result["value"] == sacrebleu.corpus_bleu(answers, [references]).score
    assert found["chrf"].result["value"] == sacrebleu.corpus_chrf(answers, [references]).score
    signature = f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert found["bleu"].result["signature"] == signature
    signature = f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}"
    assert found["chrf"].result["signature"] == signature
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = [scorer.score(reference, answer)[name].fmeasure for answer, reference in PAIRS]
        assert found[name].result["value"] == pytest.approx(sum(expected) / len(expected), rel=1e-14)


@pytest.mark.parametrize("words_in_all", [1, 3, 40])
def test_the_longest_common_subsequence_is_as_long_as_rouge_score_finds_it(words_in_all: int) -> None:
    random, scorer = numpy.random.default_rng(words_in_all), RougeScorer(["rougeL"])
    for _ in range(60):
        answer, reference = (
            " ".join(f"w{word}" for word in random.integers(0, words_in_all, random.integers(0, 90))) for _ in range(2)
        )
        (scores,) = row_scores([(answer, reference)], chinese=False)
        assert scores["rougeL"] == scorer.score(reference, answer)["rougeL"].fmeasure


def test_chinese_is_taken_apart_by_characters() -> None:
    answers, references = texts(CHINESE)
    found = compare(CHINESE)
    assert found["bleu"].result["value"] == sacrebleu.corpus_bleu(answers, [references], tokenize="zh").score
    assert "|tok:zh|" in found["bleu"].result["signature"]
    rows = row_scores(CHINESE, chinese=True)
    # 北京是中国的首都 and 中国的首都是北京: the same 8 characters; 5 of 7 pairs; 中国的首都 is 5 of 8 in order
    assert rows[0]["rouge1"] == 1
    assert rows[0]["rouge2"] == pytest.approx(5 / 7)
    assert rows[0]["rougeL"] == pytest.approx(5 / 8)
    assert rows[0]["token_f1"] == 1
    assert rows[1]["rouge1"] == 0
    assert rows[3] == {"rouge1": 1, "rouge2": 1, "rougeL": 1, "exact_match": 1, "token_f1": 1}


def test_most_letters_of_the_references_decide_what_is_chinese() -> None:
    assert is_chinese(["用 Python 写一个函数，返回列表。", "ok"])
    assert not is_chinese(["用 Python 写", "Write it in Python, please."])
    assert not is_chinese(["これはペンです"])
    assert not is_chinese(["12 + 3"])
    assert not is_chinese([])
    pairs = [("中文中文中文", "An English answer"), ("中", "Another")]  # what a model says decides nothing
    assert "|tok:13a|" in compare(pairs)["bleu"].result["signature"]


def draws(rows: int, count: int) -> list[list[int]]:
    """The rows of the first draws, as `tasks.intervals` draws them."""
    chosen = numpy.random.default_rng([SEED, rows]).integers(0, rows, (TOGETHER, rows))
    return [draw.tolist() for draw in chosen[:count]]


@pytest.mark.parametrize(("metric", "pairs"), [(BLEU(), PAIRS), (CHRF(), PAIRS), (BLEU(tokenize="zh"), CHINESE)])
def test_drawn_values_are_those_of_sacrebleu_on_the_drawn_rows(metric: Any, pairs: list[tuple[str, str]]) -> None:
    found = corpus_score(metric, pairs)
    assert found.drawn.shape == (DRAWS,)
    for number, chosen in enumerate(draws(len(pairs), 40)):
        answers, references = texts([pairs[row] for row in chosen])
        assert found.drawn[number] == pytest.approx(metric.corpus_score(answers, [references]).score, rel=1e-12)
    low, high = numpy.percentile(found.drawn, [2.5, 97.5])
    assert (found.result["low"], found.result["high"]) == (low, high)
    assert found.result["low"] < found.result["value"] < found.result["high"]


def test_rows_without_a_reference_are_answered_and_not_compared() -> None:
    answers = ["yes", "what?", "no", "hm"]
    found = measure_answers(answers, ["yes", None, "yes", None], [1, 2, 3, 6], [True, False, True, True])
    assert set(found.measures) == set(METRICS)
    assert {name: result.result["rows"] for name, result in found.measures.items()} == {
        **dict.fromkeys(("bleu", "chrf", *BY_ROW), 2),
        **dict.fromkeys(("answer_tokens", "stop_rate"), 4),
    }
    assert found.measures["exact_match"].result["value"] == 0.5
    assert found.measures["answer_tokens"].result["value"] == 3.0
    assert found.measures["stop_rate"].result["value"] == 0.75
    assert [bool(row) for row in found.rows] == [True, False, True, False]
    assert found.rows[0]["token_f1"] == 1
    alone = compare([("yes", "yes"), ("no", "yes")])
    assert alone["bleu"].result == found.measures["bleu"].result


def test_means_are_drawn_as_everything_else_is() -> None:
    found = compare(PAIRS)
    values = numpy.array([row["rougeL"] for row in row_scores(PAIRS, chinese=False)])
    assert found["rougeL"].drawn.tolist() == drawn_ratios(values, numpy.ones(len(values))).tolist()


def test_one_row_has_an_interval_of_its_own_value() -> None:
    result = compare([PAIRS[0]])["bleu"].result
    assert result["low"] == result["high"] == result["value"]
