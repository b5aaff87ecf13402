"""Word relations for few-shot prompts: the model sees ``SHOTS`` pairs of one relation and completes the next."""

from __future__ import annotations

SHOTS = 8

# relation -> "word answer" pairs; the first SHOTS are the examples of every prompt, the others are asked.
_PAIRS = {
    "antonym": """
        big small, up down, happy sad, early late, open closed, rich poor, young old, strong weak,
        hot cold, day night, good bad, black white, fast slow, left right, hard soft, true false, high low, long short,
        wet dry, full empty, light dark, love hate, first last, win lose, buy sell, push pull, wide narrow, clean dirty,
        north south, begin end, inside outside, always never""",
    "capital": """
        Austria Vienna, Finland Helsinki, Kenya Nairobi, Portugal Lisbon, Chile Santiago, Thailand Bangkok,
        Greece Athens, Norway Oslo,
        France Paris, Germany Berlin, Italy Rome, Spain Madrid, Japan Tokyo, China Beijing, Russia Moscow, Egypt Cairo,
        Canada Ottawa, Cuba Havana, Peru Lima, Ireland Dublin, Poland Warsaw, Sweden Stockholm, Hungary Budapest,
        Denmark Copenhagen, Turkey Ankara, Iran Tehran, Iraq Baghdad, England London, Belgium Brussels, Ukraine Kyiv,
        Vietnam Hanoi, Australia Canberra""",
    "plural": """
        cat cats, child children, box boxes, city cities, wolf wolves, mouse mice, dog dogs, tooth teeth,
        man men, woman women, foot feet, goose geese, book books, baby babies, leaf leaves, knife knives, bus buses,
        house houses, story stories, wife wives, country countries, church churches, tree trees, person people,
        day days, glass glasses, fish fish, party parties, life lives, army armies, key keys, dish dishes""",
    "past": """
        go went, walk walked, see saw, take took, play played, make made, come came, try tried,
        run ran, eat ate, give gave, find found, think thought, write wrote, speak spoke, break broke, know knew,
        begin began, sing sang, bring brought, buy bought, teach taught, drive drove, fly flew, stop stopped,
        carry carried, sleep slept, leave left, win won, sit sat, lose lost, build built""",
}

RELATIONS: dict[str, list[tuple[str, str]]] = {
    relation: [(word, answer) for word, answer in (pair.split() for pair in pairs.split(","))]
    for relation, pairs in _PAIRS.items()
}


def few_shot_prefix(relation: str) -> str:
    """The examples that every prompt of a relation starts with, one a line."""
    return "".join(f"{word} -> {answer}\n" for word, answer in RELATIONS[relation][:SHOTS])


def questions(relation: str) -> list[tuple[str, str]]:
    """``(prompt line, expected continuation)`` of the pairs that are asked, each to follow :func:`few_shot_prefix`."""
    return [(f"{word} ->", f" {answer}") for word, answer in RELATIONS[relation][SHOTS:]]
