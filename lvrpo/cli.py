"""The `lvrpo` command: train, eval, sample, report, info.

Wrong input ends with one line on standard error and exit code 2; Ctrl-C with 130 after the step is
finished and saved.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

if __name__ == "__main__":  # `python -m lvrpo.cli`: the door that says what is missing
    from lvrpo import __main__ as door

    door.main()
    sys.exit()

import typer

app = typer.Typer(
    name="lvrpo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Align a model that reads and draws by group relative policy optimization (LVRPO).",
)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file; `lvrpo train RUN --print-config` prints one."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="One key; may be repeated."),
]


@app.command(
    epilog="Examples:  lvrpo train runs/digits  |  lvrpo train runs/short --steps 40 --seed 1  |  "
    "lvrpo train runs/control --shuffle-rewards  |  lvrpo train runs/mine --config mine.toml"
)
def train(
    run: Annotated[Path, typer.Argument(help="Run directory; an unfinished run goes on.")],
    config: ConfigFile = None,
    set_: Overrides = None,
    steps: Annotated[int | None, typer.Option(help="Policy updates (run.steps).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the whole run (run.seed).")] = None,
    shuffle_rewards: Annotated[
        bool, typer.Option("--shuffle-rewards", help="Control: permute rewards within each group.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write the report at the end.")] = True,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration and stop.")
    ] = False,
) -> None:
    """Warm start, then LVRPO, then a report. An existing run goes on where it stopped."""
    from lvrpo.trainer.run import open_run, run_training

    overrides = list(set_ or [])
    overrides += [] if steps is None else [f"run.steps={steps}"]
    overrides += [] if seed is None else [f"run.seed={seed}"]
    overrides += ["run.shuffle_rewards=true"] if shuffle_rewards else []
    with one_line_errors():
        if print_config:
            from lvrpo.trainer.config import load_config, to_toml

            typer.echo(to_toml(load_config(config, overrides)), nl=False)
            return
        with open_run(run, config, overrides) as opened:
            finished = run_training(opened)
        if not finished:
            typer.echo(f"stopped after a finished step; go on with: lvrpo train {run}", err=True)
            raise typer.Exit(130)
        if report:
            _write_report(run, [])


@app.command(name="eval", epilog="Example:  lvrpo eval runs/digits --items 2048 --seed 7")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory with a checkpoint.")],
    items: Annotated[int, typer.Option(min=1, help="Questions and drawing prompts, each.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    data: Annotated[Path | None, typer.Option(help="JSONL file instead of the test split.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score the newest checkpoint on held-out prompts, with 95 % intervals."""
    from lvrpo.trainer.inference import evaluate_run

    with one_line_errors():
        found = evaluate_run(run, items=items, seed=seed, data=data)
        _notes(found.notes)
        typer.echo(found.to_json() if as_json else "\n".join(found.lines()))


@app.command(
    epilog='Examples:  lvrpo sample runs/digits "draw 3 at top-left and 7 at bottom-right"  |  '
    'lvrpo sample runs/digits "what digit is at top-left" --image scene.png'
)
def sample(
    run: Annotated[Path, typer.Argument(help="Run directory with a checkpoint.")],
    prompt: Annotated[str, typer.Argument(help="What to draw, or the question about --image.")],
    image: Annotated[Path | None, typer.Option(help="Picture that the question is about.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Samples.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New file of the drawing; else drawing.png, -2, ..."),
    ] = None,
) -> None:
    """Draw a prompt, or answer a question about an image file."""
    from lvrpo.trainer.inference import answer_question, draw_prompt

    said: Sequence[object]
    with one_line_errors():
        if image is None:
            said, notes = draw_prompt(run, prompt, count=count, seed=seed, output=output)
        else:
            said, notes = answer_question(run, prompt, image, count=count, seed=seed)
        _notes(notes)
        for each in said:
            typer.echo(each)


@app.command(epilog="Example:  lvrpo report runs/digits --compare runs/control")
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    compare: Annotated[
        list[Path] | None, typer.Option(help="Other runs to set beside it; may be repeated.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; else RUN/report.html.")
    ] = None,
) -> None:
    """Write report.html, and its figures into a folder beside it."""
    with one_line_errors():
        _write_report(run, compare or [], output)


@app.command()
def info() -> None:
    """Versions, the compiled extension, and which backend runs which op here."""
    from lvrpo.info import describe

    typer.echo(describe())


def _write_report(run: Path, compare: list[Path], output: Path | None = None) -> None:
    from lvrpo.trainer.report import write_report

    typer.echo(f"report: {write_report(run, compare=compare, output=output)}")


def _notes(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(f"lvrpo: note: {line}", err=True)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error that the user can mend into one line and exit code 2."""
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        from lvrpo.trainer.errors import USER_ERRORS

        if not isinstance(error, USER_ERRORS):
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            fail(f"{error.filename}: {error.strerror}")
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Print one line and end with exit code 2."""
    typer.echo(f"lvrpo: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """The command itself; lvrpo/__main__.py comes before it."""
    app()
