"""The claims of Ou et al.: shared coefficients, and translation with BLEU."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from natgrad.experiments.claims import ou, translation
from natgrad.experiments.claims.claim import CANNOT, Setting
from natgrad.experiments.claims.image_training import VGG, ImageTask
from natgrad.experiments.claims.race import Race
from natgrad.experiments.claims.run import run_claims
from natgrad.experiments.claims.translation import (
    BEGIN,
    END,
    PAD,
    Translator,
    bleu,
    read_corpus,
    train_for,
)

CLAIMS = {claim.name: claim for claim in ou.SOURCE.claims}
WORDS = {"ein": "a", "hund": "dog", "läuft": "runs", ".": "."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty sentences in two languages, word for word."""
    order = [[*WORDS][i % 3 :] for i in range(40)]
    for language, look_up in (("de", dict(zip(WORDS, WORDS, strict=True))), ("en", WORDS)):
        lines = "\n".join(" ".join(look_up[w] for w in words).upper() for words in order)
        (tmp_path / f"train.{language}").write_text(lines, encoding="utf-8")
        with gzip.open(tmp_path / f"test_2016_flickr.{language}.gz", "wt", encoding="utf-8") as f:
            f.write(lines)
    return tmp_path


@pytest.fixture
def race(monkeypatch):
    """Two draws, two trials, two epochs of a small network on the digits."""
    data = Setting().dataset(200, test_samples=50)
    network = lambda c, k, side: VGG(c, k, ((4,), (8,)), side)  # noqa: E731
    few = {n: dataclasses.replace(m, trials=m.trials[:2]) for n, m in ou.RACE.methods.items()}
    race = Race(lambda setting: ImageTask(data, network, 2, 50), few, 2)
    monkeypatch.setattr(ou, "RACE", race)
    return race


def test_coefficients_are_compared_at_the_rate_of_shared_ones(race):
    setting = Setting()
    figures = ou.coefficients(setting)
    (rate,) = race.best(setting, "fngd")
    assert figures["best rate of FNGD"] == rate

    def last(name: str) -> list[float]:
        return [setting.parts[f"{name} ({rate},) {draw}"]["loss"][-1] for draw in (1, 2)]

    ratios = [a / b for a, b in zip(last("fngd"), last("own"), strict=True)]
    assert figures["training loss, shared / own coefficients"] == ratios
    # The first epoch is the same for both: coefficients are solved for at every step.
    first = [setting.parts[f"{n} ({rate},) 1"]["loss"][0] for n in ("fngd", "own", "mean")]
    assert len(set(first)) == 1 and last("fngd") != last("own") != last("mean")
    assert figures["training loss, shared coefficients / SGD at the same rate"] == [
        a / b for a, b in zip(last("fngd"), last("sgd"), strict=True)
    ]


def test_times_are_those_of_the_runs(race):
    setting = Setting()
    figures = ou.epoch_time(setting)
    (rate,), (factor,) = race.best(setting, "fngd"), race.best(setting, "kfac")
    fngd, always = (
        [setting.parts[f"{key} {draw}"]["seconds"] for draw in (1, 2)]
        for key in (f"fngd ({rate},)", f"kfac-always ({factor},)")
    )
    assert figures["seconds of an epoch, K-FAC renewed at every step / FNGD"] == pytest.approx(
        [(b[1] - b[0]) / (a[1] - a[0]) for a, b in zip(fngd, always, strict=True)]
    )
    figures = ou.time_to_accuracy(setting)
    judged = [name for name in figures if CLAIMS["ou.time-to-accuracy"].expectation(name)]
    assert len(judged) == 1 and all(0 < v < math.inf for v in figures[judged[0]])


def test_sentences_are_read_split_and_numbered(folder):
    corpus = read_corpus(folder, 30, 5, 11)  # "ein" and "a" occur 10 times only
    assert len(corpus.train) == 30 and len(corpus.test) == len(corpus.references) == 5
    assert corpus.references[0] == ["a", "dog", "runs", "."]
    assert set(corpus.english[4:]) == {"dog", "runs", "."}
    german, english = corpus.train[0]
    assert [corpus.german[i] for i in german] == [
        "<begin>", "<unknown>", "hund", "läuft", ".", "<end>"
    ]  # fmt: skip
    assert len(english) == 6 and english[0] == BEGIN and english[-1] == END
    batch = next(corpus.batches(8, 0))
    assert len(batch[0]) == 8 and (batch[0] == PAD).any()


def test_missing_or_unequal_files_are_told_in_a_sentence(folder, tmp_path):
    with pytest.raises(RuntimeError, match="give --data-dir"):
        read_corpus(None, None, 5, 1)
    (folder / "train.en").write_text("one line")
    with pytest.raises(RuntimeError, match="different numbers of lines"):
        read_corpus(folder, None, 5, 1)
    (folder / "train.en").unlink()
    with pytest.raises(RuntimeError, match=r"no train.en or train.en.gz of Multi30K"):
        read_corpus(folder, None, 5, 1)


def test_without_its_files_the_claim_cannot_be_told(tmp_path):
    claim = CLAIMS["ou.translation"]
    ((result,), _) = run_claims([claim], tmp_path)
    assert result.verdict(claim) == CANNOT and "give --data-dir" in result.error


@pytest.fixture
def clock(monkeypatch):
    """A clock by which every step takes two seconds."""
    looks = itertools.count()
    monkeypatch.setattr(translation, "processor_time", lambda device: 2.0 * next(looks))


def test_bleu_is_that_of_greedy_translations_by_its_definition(folder, clock):
    corpus = read_corpus(folder, None, 40, 1)
    torch.manual_seed(0)
    model = Translator(len(corpus.german), len(corpus.english), 8, 1)
    before = bleu(model, corpus)
    adam = lambda m, loss: torch.optim.Adam(m.parameters(), lr=0.02)  # noqa: E731
    loss, steps = train_for(299.0, model, adam, corpus, 8, 0)
    assert steps == 150 and loss < 1.0
    after = bleu(model, corpus)
    assert before < 20 < after

    # Greedy, step by step, one sentence at a time; BLEU with up to four words in a row.
    candidates = []
    for german in corpus.test:
        words = [BEGIN]
        while words[-1] != END and len(words) <= 40:
            with torch.no_grad():
                logits = model(german[None], torch.tensor([words]))
            words.append(int(logits[0, -1].argmax()))
        candidates.append([corpus.english[i] for i in words[1:] if i != END])
    assert all(len(one) >= 1 for one in candidates)
    logarithm = 0.0
    for size in range(1, 5):
        right = total = 0
        for found, wanted in zip(candidates, corpus.references, strict=True):
            counts = [
                Counter(tuple(w[i : i + size]) for i in range(len(w) - size + 1))
                for w in (found, wanted)
            ]
            right, total = right + (counts[0] & counts[1]).total(), total + counts[0].total()
        logarithm += math.log(right / total) / 4
    lengths = sum(map(len, corpus.references)) / sum(map(len, candidates))
    expected = 100 * math.exp(logarithm + min(0.0, 1 - lengths))
    assert after == pytest.approx(expected, rel=1e-9)


def test_a_translation_that_diverges_has_an_infinite_loss(folder):
    corpus = read_corpus(folder, None, 5, 1)
    model = Translator(len(corpus.german), len(corpus.english), 8, 1)
    sgd = lambda m, loss: torch.optim.SGD(m.parameters(), lr=1e30)  # noqa: E731
    assert train_for(5.0, model, sgd, corpus, 8, 0)[0] == math.inf


def test_translations_are_compared_after_equal_time(folder, monkeypatch, clock):
    corpus = read_corpus(folder, None, 5, 1)
    monkeypatch.setattr(ou, "_corpus", lambda *key: corpus)
    monkeypatch.setattr(ou, "TRANSLATION_DRAWS", 2)
    figures = ou.translation(Setting())
    for name in ("AdamW", "FNGD", "SGD"):
        assert figures[f"steps of {name}"] == [5.0, 5.0]  # 10 seconds
    pairs = zip(figures["BLEU of FNGD"], figures["BLEU of AdamW"], strict=True)
    assert figures["BLEU, FNGD − AdamW"] == [a - b for a, b in pairs]
    assert figures["rate of SGD"] == figures["rate of FNGD"]
