"""Answers compared with the answers that a data set has.

One decision: sacrebleu and rouge-score count and compute. Of bleu and chrf every row gives the counts that the library
itself adds up over a corpus; so the value is the library's, and the values for drawn rows are its own formula on sums
of drawn rows. One thing is done here: the length of the longest common subsequence behind `rougeL`, for which
rouge-score takes 0.3 s where two texts have 600 words.

Words of Chinese are not written apart: there every Han character is a word, and so is a run of other letters or
digits. Whether a data set is Chinese is decided once, from its references.

Legend: r rows, k counts of a row, n draws.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import fmeasure
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU, CHRF

from tasks.intervals import drawn_sums
from tasks.measurements import Measure, mean, measure

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
HAN_CHARACTER = re.compile(f"[{HAN}]")
CHINESE_WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")
ARTICLE = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ROUGE = ("rouge1", "rouge2", "rougeL")
BY_ROW = (*ROUGE, "exact_match", "token_f1")
"""Metrics that every row has a value of; over rows it is their mean."""


class Compared(NamedTuple):
    """Answers, measured."""

    measures: dict[str, Measure]
    """Metric → number. Rows without a reference count in `answer_tokens` and `stop_rate` only."""
    rows: list[dict[str, float]]
    """`BY_ROW` → value of each row; nothing for a row without a reference."""


def measure_answers(
    answers: Sequence[str], references: Sequence[str | None], tokens: Sequence[int], stopped: Sequence[bool]
) -> Compared:
    """Compare answers with references.

    Args:
        answers: what a model wrote; one for each row.
        references: what the data set has, None where it has nothing; one at least is there.
        tokens: of each answer, its terminator not counted.
        stopped: whether each ended by itself.

    Returns:
        `bleu` and `chrf`, 0 to 100, of the whole; the means of `BY_ROW`, 0 to 1; mean `answer_tokens` and `stop_rate`.
    """
    known = [
        (answer, reference) for answer, reference in zip(answers, references, strict=True) if reference is not None
    ]
    chinese = is_chinese([reference for _, reference in known])
    compared = iter(row_scores(known, chinese))
    rows = [{} if reference is None else next(compared) for reference in references]
    found = {
        "bleu": corpus_score(BLEU(tokenize="zh" if chinese else "13a"), known),
        "chrf": corpus_score(CHRF(), known),
    }
    found |= {name: mean(numpy.array([row[name] for row in rows if row])) for name in BY_ROW}
    found |= {"answer_tokens": mean(numpy.array(tokens)), "stop_rate": mean(numpy.array(stopped))}
    return Compared(found, rows)


def is_chinese(texts: Sequence[str]) -> bool:
    """Whether most letters are Han characters.

    >>> is_chinese(["在 Python 里用字典表示映射。"]), is_chinese(["The character 中 means middle."])
    (True, False)
    """
    han = sum(len(HAN_CHARACTER.findall(text)) for text in texts)
    return 2 * han > sum(letter.isalpha() for text in texts for letter in text)


def corpus_score(metric: BLEU | CHRF, pairs: Sequence[tuple[str, str]]) -> Measure:
    """A metric of sacrebleu on a corpus, 0 to 100, with its `signature`.

    Args:
        metric: how it counts.
        pairs: answer and reference of each row.
    """
    answers, references = [answer for answer, _ in pairs], [reference for _, reference in pairs]
    counts = metric._extract_corpus_statistics(answers, [references])  # [r][k]
    value = metric._aggregate_and_compute(counts).score
    sums = drawn_sums(numpy.array(counts, numpy.float64))  # [n, k]; below 2^53 every count is exact
    drawn = numpy.array([metric._compute_score_from_stats(row).score for row in sums.tolist()])
    return measure(value, drawn, len(pairs), signature=str(metric.get_signature()))


class _ChineseWords:
    """For rouge-score, whose own tokenizer drops everything but a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        return CHINESE_WORD.findall(text.lower())


def row_scores(pairs: Sequence[tuple[str, str]], chinese: bool) -> list[dict[str, float]]:
    """`BY_ROW` → value of each row, 0 to 1; rouge is the F-measure, without stemming.

    Args:
        pairs: answer and reference of each row.
        chinese: how texts are taken apart.
    """
    tokenizer = _ChineseWords() if chinese else DefaultTokenizer()
    scorer: Any = RougeScorer(list(ROUGE[:2]), tokenizer=tokenizer)
    rows = []
    for answer, reference in pairs:
        scores = {name: float(score.fmeasure) for name, score in scorer.score(reference, answer).items()}
        scores["rougeL"] = rouge_l(tokenizer.tokenize(answer), tokenizer.tokenize(reference))
        scores["exact_match"] = float(answer.strip() == reference.strip())
        scores["token_f1"] = token_f1(answer, reference, chinese)
        rows.append(scores)
    return rows


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F-measure of the longest common subsequence, as rouge-score has it.

    >>> rouge_l(["police", "kill", "the", "gunman"], ["police", "killed", "the", "gunman"])
    0.75

    Source: Lin 2004, "ROUGE", section 3.1; the length by Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    if not answer or not reference:
        return 0.0
    places: dict[str, int] = {}
    for place, word in enumerate(reference):
        places[word] = places.get(word, 0) | 1 << place
    everywhere = (1 << len(reference)) - 1
    left = everywhere  # a bit that has gone out is a place where the length grows by one
    for word in answer:
        found = left & places.get(word, 0)
        left = (left + found | left - found) & everywhere
    length = len(reference) - left.bit_count()
    return float(fmeasure(length / len(answer), length / len(reference)))


def token_f1(answer: str, reference: str, chinese: bool = False) -> float:
    """F1 of the words that both have; 1 when neither has a word, 0 when only one has none.

    >>> token_f1("It is Paris.", "paris")  # 1 of 3 words, and 1 of 1
    0.5

    Source: Rajpurkar et al. 2016, SQuAD, section 6.1, and its evaluation script.
    """
    ours, theirs = (Counter(words(text, chinese)) for text in (answer, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def words(text: str, chinese: bool = False) -> list[str]:
    """The words of a text as SQuAD compares them: lower case, without punctuation and articles.

    >>> words("The cat's  hat!"), words("用Python 3写。", chinese=True)
    (['cats', 'hat'], ['用', 'python', '3', '写'])
    """
    if chinese:
        return CHINESE_WORD.findall(text.lower())
    return ARTICLE.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()
