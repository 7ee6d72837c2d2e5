"""Multi30K, a small transformer that translates it, and BLEU."""

from __future__ import annotations

import gzip
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from natgrad.experiments.claims.image_training import processor_time

TEXTS = ("multi30k",)
"""Names of data that are sentences, beside the images of :mod:`natgrad.experiments.data`."""

PAD, UNKNOWN, BEGIN, END = range(4)
LONGEST = 40
"""Words of a sentence; the few longer ones are cut."""

Words = list[str]


@dataclass(frozen=True)
class Corpus:
    """German sentences and their English translations as numbers of words, which are in lists.

    Those to train on are pairs; `references` are the translations of the test sentences as words.
    """

    train: list[tuple[Tensor, Tensor]]
    test: list[Tensor]
    references: list[Words]
    german: Words
    english: Words

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield random batches without end, padded; of an incomplete last one no more is seen."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(self.train), generator=generator).split(size):
                if len(chosen) == size:
                    german, english = zip(*(self.train[i] for i in chosen.tolist()), strict=True)
                    yield _padded(german), _padded(english)


def read_corpus(folder: Path | None, train: int | None, test: int, least: int) -> Corpus:
    r"""Read Multi30K, split in words by ``\w+|[^\w\s]``, lower case.

    The folder has ``train.de``, ``train.en``, ``test_2016_flickr.de`` and ``.en``, plain or
    compressed as ``.gz``, or a sub-folder ``multi30k`` of them. So many pairs are to train on (None
    for all) and so many sentences to translate; a word that occurs `least` times in the pairs has a
    number. A file that is missing, or of another length than its translation, is a `RuntimeError`.
    """
    if folder is None:
        raise RuntimeError(
            "Multi30K is read from files: give --data-dir, the folder that holds multi30k/."
        )
    german, english = (_sentences(folder, f"train.{one}")[:train] for one in ("de", "en"))
    test_german, references = (
        _sentences(folder, f"test_2016_flickr.{one}")[:test] for one in ("de", "en")
    )
    if len(german) != len(english) or len(test_german) != len(references):
        raise RuntimeError(
            f"The German and English files of Multi30K in {folder} have different numbers of "
            "lines, so they are no translations of each other: take the original files."
        )
    words = _frequent(german, least), _frequent(english, least)
    pairs = zip(_encoded(german, words[0]), _encoded(english, words[1]), strict=True)
    return Corpus(list(pairs), _encoded(test_german, words[0]), references, *words)


def _sentences(folder: Path, name: str) -> list[Words]:
    names = (f"{base}{name}{end}" for base in ("multi30k/", "") for end in ("", ".gz"))
    path = next(filter(Path.is_file, map(folder.joinpath, names)), None)
    if path is None:
        raise RuntimeError(
            f"There is no {name} or {name}.gz of Multi30K in {folder} or {folder / 'multi30k'}."
        )
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return [re.findall(r"\w+|[^\w\s]", line.lower()) for line in text.splitlines()]


def _frequent(sentences: Sequence[Words], least: int) -> Words:
    counts = Counter(word for sentence in sentences for word in sentence)
    frequent = [word for word, count in counts.most_common() if count >= least]
    return ["<pad>", "<unknown>", "<begin>", "<end>", *frequent]


def _encoded(sentences: Sequence[Words], words: Words) -> list[Tensor]:
    numbers = {word: number for number, word in enumerate(words)}
    return [
        torch.tensor([BEGIN, *(numbers.get(word, UNKNOWN) for word in one[:LONGEST]), END])
        for one in sentences
    ]


def _padded(sentences: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(sentences), batch_first=True, padding_value=PAD)


class Translator(nn.Module):
    """An encoder-decoder transformer, LayerNorm before each part, with sinusoidal positions.

    `german` and `english` are numbers of words; `width`, the features of a word, is a multiple of
    4, the number of heads; encoder and decoder have `depth` layers each.
    """

    def __init__(self, german: int, english: int, width: int, depth: int) -> None:
        super().__init__()
        self.german: nn.Embedding = nn.Embedding(german, width, padding_idx=PAD)
        self.english: nn.Embedding = nn.Embedding(english, width, padding_idx=PAD)
        sizes = width, 4, 4 * width, 0.1  # The last is dropout.
        encoder = nn.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=True)
        decoder = nn.TransformerDecoderLayer(*sizes, batch_first=True, norm_first=True)
        norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.encoder: nn.Module = nn.TransformerEncoder(encoder, depth, norm[0], False)
        self.decoder: nn.Module = nn.TransformerDecoder(decoder, depth, norm[1])
        self.output: nn.Linear = nn.Linear(width, english)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for table in (self.german, self.english):
            nn.init.normal_(table.weight, std=width**-0.5)
            with torch.no_grad():
                table.weight[PAD].zero_()
        angles = torch.arange(LONGEST + 2)[:, None] * 1e4 ** (-torch.arange(0, width, 2) / width)
        positions = torch.stack((angles.sin(), angles.cos()), 2).flatten(1)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, german: Tensor, english: Tensor) -> Tensor:
        """Return the logits of the next English word behind every word of ``english``."""
        return self._decode(*self._encode(german), english)

    def _embedded(self, table: nn.Embedding, words: Tensor) -> Tensor:
        found: Tensor = math.sqrt(table.embedding_dim) * table(words)
        return found + self.get_buffer("positions")[: words.shape[1]]

    def _encode(self, german: Tensor) -> tuple[Tensor, Tensor]:
        padding, embedded = german == PAD, self._embedded(self.german, german)
        return self.encoder(embedded, src_key_padding_mask=padding), padding

    def _decode(self, memory: Tensor, padding: Tensor, english: Tensor) -> Tensor:
        length = english.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=english.device).triu(1)
        masks = {"tgt_mask": future, "memory_key_padding_mask": padding}
        found = self.decoder(self._embedded(self.english, english), memory, **masks)
        logits: Tensor = self.output(found)
        return logits

    @torch.no_grad()
    def translate(self, german: Tensor) -> list[list[int]]:
        """Return the most probable word after each other (greedy), up to the end."""
        memory, padding = self._encode(german)
        english = torch.full((len(german), 1), BEGIN, device=german.device)
        for _ in range(LONGEST):
            following = self._decode(memory, padding, english)[:, -1].argmax(1, keepdim=True)
            english = torch.cat((english, following), 1)
            if (english == END).any(1).all():
                break
        sentences = english[:, 1:].tolist()
        return [s[: s.index(END)] if END in s else s for s in sentences]


def bleu(model: Translator, corpus: Corpus) -> float:
    """Return corpus BLEU of greedy translations, by sacrebleu, in per cent.

    Candidates and references are words in lower case as the corpus splits them, so sacrebleu splits
    no further (``tokenize="none"``).
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise RuntimeError("BLEU is computed by sacrebleu: pip install sacrebleu.") from error
    model.eval()
    device = model.output.weight.device
    found: list[str] = []
    for start in range(0, len(corpus.test), 100):
        german = _padded(corpus.test[start : start + 100]).to(device)
        found += [" ".join(corpus.english[i] for i in one) for one in model.translate(german)]
    references = [" ".join(words) for words in corpus.references]
    return float(BLEU(tokenize="none", force=True).corpus_score(found, [references]).score)


def train_for(
    seconds: float,
    model: Translator,
    make: Callable[[Translator, nn.Module], torch.optim.Optimizer],
    corpus: Corpus,
    batch_size: int,
    seed: int,
) -> tuple[float, int]:
    """Train a model for so many processor seconds.

    `make` makes the optimizer of the model and its loss, which leaves out padding. Returned are the
    mean loss of the last 20 steps, infinite where it is not finite, and the steps taken.
    """
    criterion = nn.CrossEntropyLoss(ignore_index=PAD)
    optimizer = make(model, criterion)
    device = model.output.weight.device
    stream, losses, spent = corpus.batches(batch_size, seed), [math.inf], 0.0
    model.train()
    while spent < seconds:
        german, english = (side.to(device) for side in next(stream))
        began = processor_time(device)
        optimizer.zero_grad()
        logits = model(german, english[:, :-1])
        loss = criterion(logits.flatten(0, 1), english[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        spent += processor_time(device) - began
        if not math.isfinite(losses[-1]):
            return math.inf, len(losses) - 1
    last = losses[1:][-20:]
    return sum(last) / len(last), len(losses) - 1
