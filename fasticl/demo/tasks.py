"""Word relations for few-shot prompts: the model sees ``SHOTS`` pairs of one relation and completes the next."""

from __future__ import annotations

from fasticl.evaluate import load_task

SHOTS = 8
PAIRS = 32  # of each relation; the first SHOTS are the examples of every prompt, the others are asked

RELATIONS: dict[str, list[tuple[str, str]]] = {
    relation: list(load_task(relation).items[:PAIRS]) for relation in ("antonym", "capital", "plural", "past")
}


def few_shot_prefix(relation: str) -> str:
    """The examples that every prompt of a relation starts with, one a line."""
    return "".join(f"{word} -> {answer}\n" for word, answer in RELATIONS[relation][:SHOTS])


def questions(relation: str) -> list[tuple[str, str]]:
    """``(prompt line, expected continuation)`` of the pairs that are asked, each to follow :func:`few_shot_prefix`."""
    return [(f"{word} ->", f" {answer}") for word, answer in RELATIONS[relation][SHOTS:]]
