"""A small synthetic corpus of movie queries with the twelve entity types of MIT Movie.

It runs the pipeline from text to scores without a download. A seeded generator fills templates from
word lists. The test set uses other templates than the training set, and no name, title or song
occurs in both.

    python -m minibert.text.demo DIR
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from minibert.text.bio import Sentence, write_bio

SEED = 2026
TRAIN_SIZE, TEST_SIZE = 1500, 300


def _list(text: str, separator: str | None = None) -> list[str]:
    """The entries of a word list that may span several lines."""
    return [entry.strip() for entry in " ".join(text.split()).split(separator)]


FIRST = _list("""
    alma boris clara dexter edith felix greta hugo irene jasper katya lionel mabel nestor odette
    percy quincy rosalind silas tilda ulric vera wendell ximena yara zeno agnes barnaby cora dorian
    elsa fabian gwen horace ingrid jonas kirsten leopold mina norbert
""")
LAST = _list("""
    abernathy blackwood castellan drummond ellery farrow goldwater hartigan iverson jessop kessler
    lindqvist marlowe nakamura okafor pemberton quill ravenscroft santoro thackeray underhill valdez
    whitlock yarrow zimmer ashdown bellamy corrigan delacroix everhart fontaine grimaldi
""")
RANK = _list("captain doctor detective princess agent professor sergeant queen baron inspector")
TITLE_A = _list("""
    crimson silent broken midnight electric hollow golden frozen burning last secret paper velvet
    distant iron forgotten endless savage quiet wandering scarlet winter hidden lonely
""")
TITLE_B = _list("""
    harbor garden empire river mirror orchard station horizon lantern circus kingdom voyage daughter
    stranger waltz protocol canyon letters cathedral symphony island machine parade sparrow
""")
SONG_A = _list("dancing crying running waiting singing falling dreaming driving whispering burning")
SONG_B = _list(
    """in the rain;on the moon;through the night;without you;after midnight;by the sea;all summer;
    under neon lights;back to memphis;for a dollar""",
    ";",
)

WORDS = {
    "GENRE": _list(
        """comedy;comedies;horror;drama;dramas;thriller;western;westerns;musical;animated;
        science fiction;sci fi;romantic comedy;romantic comedies;film noir;documentary;action;
        adventure;war;crime;family;mystery;fantasy;slapstick;spy;martial arts""",
        ";",
    ),
    "PLOT": _list(
        """a bank robbery;time travel;a haunted lighthouse;two brothers who hate each other;cooking;
        a road trip across siberia;vampires;zombies;a talking dog;a court martial;a shipwreck;
        the french revolution;a chess champion;a stolen painting;an alien invasion;baseball;
        high school rivalry;a killer robot;a wedding gone wrong;coal miners;espionage;a jewel heist;
        mountain climbing;an orphan who becomes a pilot;a cursed necklace;undercover cops;
        a lost city;body swapping;surviving on an island;a murder at sea;
        a journalist chasing a story""",
        ";",
    ),
    "RATING": _list("g;pg;pg 13;r;nc 17;rated r;rated pg;pg thirteen;unrated", ";"),
    "RATINGS_AVERAGE": _list(
        """five stars;four stars;highly rated;very good;nine out of ten;must see;at least seven;
        two thumbs up;top rated;average;eight stars and above;mediocre;really popular""",
        ";",
    ),
    "REVIEW": _list(
        """critics reviews;review;reviews;what people thought;what critics said;viewer comments;
        audience opinion""",
        ";",
    ),
    "TRAILER": _list("trailer;trailers;teaser;preview;previews;clip;sneak peek", ";"),
    "YEAR": _list(
        """1950s;1960s;1970s;1980s;1990s;the eighties;the nineties;the seventies;past ten years;
        last five years;last decade;this year;recent;early 2000s""",
        ";",
    ),
}

# {TYPE} is a slot for an entity of that type.
TRAIN_TEMPLATES = """
show me {GENRE} movies from the {YEAR}
show me a {GENRE} movie starring {ACTOR}
who directed {TITLE}
who starred in {TITLE}
what movies did {DIRECTOR} direct
is there a {RATINGS_AVERAGE} {GENRE} film about {PLOT}
find a {RATING} movie about {PLOT}
what is the movie with the song {SONG}
play the {TRAILER} for {TITLE}
who played {CHARACTER} in {TITLE}
was {ACTOR} in {TITLE}
list {RATING} {GENRE} movies with {ACTOR}
what year did {TITLE} come out
which film has the character {CHARACTER}
what are the {REVIEW} for {TITLE}
a movie about {PLOT} directed by {DIRECTOR}
did {ACTOR} and {ACTOR} ever appear together
name a {RATINGS_AVERAGE} film from {YEAR}
can you find me {GENRE} movies rated {RATING}
what is {TITLE} about
who sang {SONG} in {TITLE}
tell me the {REVIEW} of the {GENRE} movie {TITLE}
movies about {PLOT} with {ACTOR} from {YEAR}
what actor plays {CHARACTER}
has {DIRECTOR} directed anything {RATINGS_AVERAGE}
"""
TEST_TEMPLATES = """
what {GENRE} films did {DIRECTOR} make in {YEAR}
i want to watch a {GENRE} movie with {ACTOR} and {ACTOR}
what is the rating of {TITLE}
is {TITLE} a {GENRE} movie
in what movie does {ACTOR} sing {SONG}
how many {GENRE} movies were made in {YEAR}
i would like to see a {TRAILER} of the film {TITLE}
do you know a {GENRE} picture by {DIRECTOR} about {PLOT}
was {TITLE} {RATINGS_AVERAGE} when it came out in {YEAR}
which {DIRECTOR} film uses the song {SONG}
where can i watch {TRAILER} of {TITLE} with {ACTOR}
are there any {RATING} films in which {ACTOR} is {CHARACTER}
{ACTOR} and {PLOT}
the one where {CHARACTER} deals with {PLOT}
is there anything {RATING} and {GENRE} from {DIRECTOR}
did the {REVIEW} like {TITLE} by {DIRECTOR}
{SONG} comes from which picture
"""


def generate(seed: int = SEED) -> tuple[list[Sentence], list[Sentence]]:
    """Training and test sentences: 1500 and 300, the same for a seed on every machine."""
    rng = random.Random(seed)
    train_names, test_names = _names(rng)
    return (
        _sentences(rng, TRAIN_TEMPLATES, WORDS | train_names, TRAIN_SIZE),
        _sentences(rng, TEST_TEMPLATES, WORDS | test_names, TEST_SIZE),
    )


def _names(rng: random.Random) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The words of each type for training and for the test: two disjoint sets."""
    # Actors and directors share names, so that only the context tells which is meant.
    people = [f"{first} {last}" for first in FIRST for last in LAST]
    titles = [f"the {b}" for b in TITLE_B]
    titles += [f"{the}{a} {b}" for the in ("", "the ") for a in TITLE_A for b in TITLE_B]
    songs = [f"{a} {b}" for a in SONG_A for b in SONG_B]
    characters = [f"{rank} {last}" for rank in RANK for last in LAST]
    train, test = {}, {}
    every = {"ACTOR": people, "TITLE": titles, "SONG": songs, "CHARACTER": characters}
    for type_, names in every.items():
        rng.shuffle(names)
        border = len(names) * 4 // 5
        train[type_], test[type_] = names[:border], names[border:]
    train["DIRECTOR"], test["DIRECTOR"] = train["ACTOR"], test["ACTOR"]
    return train, test


def _sentences(
    rng: random.Random, templates: str, words: dict[str, list[str]], count: int
) -> list[Sentence]:
    lines = templates.strip().split("\n")
    sentences, line = [], 1
    for _ in range(count):
        pairs = list(_fill(rng, rng.choice(lines), words))
        sentences.append(Sentence(tuple(w for w, _ in pairs), tuple(t for _, t in pairs), line))
        line += len(pairs) + 1
    return sentences


def _fill(
    rng: random.Random, template: str, words: dict[str, list[str]]
) -> Iterator[tuple[str, str]]:
    """The words of a template, with random entities in its slots, and their tags."""
    for part in template.split():
        if not part.startswith("{"):
            yield part, "O"
            continue
        type_ = part.strip("{}")
        for i, word in enumerate(rng.choice(words[type_]).split()):
            yield word, f"{'I' if i else 'B'}-{type_}"


def write(directory: Path) -> None:
    """Write ``train.bio`` and ``test.bio``.

    Raises:
        MinibertError: a file cannot be written.
    """
    for name, sentences in zip(("train.bio", "test.bio"), generate()):
        write_bio(directory / name, sentences)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
