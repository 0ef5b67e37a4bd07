"""What a study is: arms that differ in named settings, from the same warm starts."""

from __future__ import annotations

from dataclasses import dataclass

from lvrpo.data.example import Skill


@dataclass(frozen=True)
class Arm:
    """Runs that differ from the study's base in what is named here alone, one per seed.

    Attributes:
        name: of the folder of its runs.
        title: for people.
        settings: `section.key=value`, in TOML syntax.
    """

    name: str
    title: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
        name: of the command.
        title: of the page.
        question: what it asks, in a sentence or two.
        base: its run of a seed makes the warm start that all arms of that seed begin with.
        arms: the others.
        settings: `section.key=value` of all runs, where the defaults would take too long.
        skills: without whose prompts some of its arms would not differ.
    """

    name: str
    title: str
    question: str
    base: Arm
    arms: tuple[Arm, ...]
    settings: tuple[str, ...] = ()
    skills: tuple[Skill, ...] = ()

    @property
    def all_arms(self) -> tuple[Arm, ...]:
        """The base, then the others."""
        return (self.base, *self.arms)
