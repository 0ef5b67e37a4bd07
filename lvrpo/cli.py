"""The `lvrpo` command: train, eval, sample, export, report, study, plan, info.

Wrong input ends with one line on standard error and exit code 2, any other error with one line and
1 (`--debug` shows the traceback), and a signal with 128 plus its number: 130 after Ctrl-C, 143
after SIGTERM. The last finished step is saved in every case.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="lvrpo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file; `lvrpo train RUN --print-config` prints one."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="One key; may be repeated."),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:N, in place of run.device of the run."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def print_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        from lvrpo import __version__

        typer.echo(f"lvrpo {__version__}")
        raise typer.Exit


@app.callback()
def lvrpo(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Align a model that reads and draws by group relative policy optimization (LVRPO)."""


@app.command(
    epilog="Examples:  lvrpo train runs/digits  |  lvrpo train runs/short --steps 40 --seed 1  |  "
    "lvrpo train runs/control --from runs/digits --shuffle-rewards  |  "
    "lvrpo train runs/mine --config mine.toml"
)
def train(
    run: Annotated[
        Path | None, typer.Argument(help="Run directory; a run that is there goes on.")
    ] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    steps: Annotated[int | None, typer.Option(help="Policy steps (run.steps).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the whole run (run.seed).")] = None,
    shuffle_rewards: Annotated[
        bool, typer.Option("--shuffle-rewards", help="Control: permute rewards within each group.")
    ] = False,
    supervised: Annotated[
        bool,
        typer.Option(
            "--supervised",
            help="Baseline: supervised steps in place of LVRPO; with --from, of equal compute.",
        ),
    ] = False,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Begin after the warm start of another run."),
    ] = None,
    resume_at: Annotated[
        int | None,
        typer.Option(metavar="STEP", help="Go on from an earlier checkpoint; later ones go."),
    ] = None,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes", help="Go on though data or reward code has changed; is recorded."
        ),
    ] = False,
    report: Annotated[bool, typer.Option(help="Write the report at the end.")] = True,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would run, and stop.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Warm start, then LVRPO, then a report. An existing run goes on where it stopped."""
    overrides = list(set_ or [])
    overrides += [] if steps is None else [f"run.steps={steps}"]
    overrides += [] if seed is None else [f"run.seed={seed}"]
    overrides += ["run.shuffle_rewards=true"] if shuffle_rewards else []
    overrides += ["run.objective=supervised"] if supervised else []
    with one_line_errors(debug):
        from lvrpo.runs.commands import describe_run, opened_by_first, run_training
        from lvrpo.runs.config_file import load_config, to_toml
        from lvrpo.runs.opening import open_run
        from lvrpo.runs.processes import processes

        if print_config:
            typer.echo(to_toml(load_config(config, overrides)), nl=False)
            return
        if run is None:
            fail("train needs a run directory: lvrpo train RUN")
        opening = open_run(
            run,
            config,
            overrides,
            origin=from_,
            accept_changes=accept_changes,
            resume_at=resume_at,
            dry=dry_run,
        )
        try:
            with processes() as ranks, opened_by_first(opening, ranks) as opened:
                if dry_run and not ranks.is_first:
                    return
                if dry_run:
                    for line in describe_run(opened):
                        typer.echo(f"# {line}")  # so that the whole is TOML
                    typer.echo(to_toml(opened.config), nl=False)
                    return
                run_training(opened, ranks)
        except KeyboardInterrupt as stop:
            _stopped(stop, f"lvrpo train {run}")
        if report and ranks.is_first:
            _report_of_training(run)


@app.command(
    name="eval",
    epilog="Examples:  lvrpo eval runs/digits --items 2048 --seed 7  |  "
    "lvrpo eval runs/digits --temperature 0.5 --temperature 1 --pass-at 8",
)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory with a checkpoint.")],
    items: Annotated[int, typer.Option(min=1, help="Questions and drawing prompts, each.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    data: Annotated[Path | None, typer.Option(help="JSONL file instead of the test split.")] = None,
    split: Annotated[str, typer.Option(help="test, or validation to make choices by.")] = "test",
    temperature: Annotated[
        list[float] | None, typer.Option(help="Of answers, 0 is greedy; may be repeated.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Likeliest answers.")] = False,
    ode: Annotated[bool, typer.Option("--ode", help="Drawings without noise on the way.")] = False,
    noise: Annotated[
        list[float] | None,
        typer.Option(help="The same from so much noise, 1 is all; may be repeated."),
    ] = None,
    pass_at: Annotated[
        int | None,
        typer.Option(help="K samples of each prompt: pass@K, and the best of K by the reward."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="eval.KEY=VALUE", help="In place of the run's; may be repeated."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Measure the newest checkpoint on held-out prompts, with 95 % intervals.

    Without a way of sampling: by its modes (greedy answers, drawings by the ODE from no noise), as
    it is trained, and as [eval] says.
    """
    from lvrpo.runs.evaluation import EvalOptions, evaluate_run, to_json

    with one_line_errors(debug):
        options = EvalOptions(
            items=items,
            seed=seed,
            data=data,
            split=split,
            temperatures=temperature or (),
            greedy=greedy,
            ode=ode,
            start_noises=noise or (),
            pass_at=pass_at,
            overrides=set_ or (),
            device=device,
        )
        results, notes = evaluate_run(run, options)
        _notes(notes)
        typer.echo(to_json(results) if as_json else "\n".join(each.line() for each in results))


@app.command(
    epilog='Examples:  lvrpo sample runs/digits "draw 3 at top-left and 7 at bottom-right"  |  '
    'lvrpo sample runs/digits "what digit is at top-left" --image scene.png'
)
def sample(
    run: Annotated[Path, typer.Argument(help="Run directory with a checkpoint.")],
    prompt: Annotated[str, typer.Argument(help="What to draw, or a question.")],
    image: Annotated[Path | None, typer.Option(help="Picture that the question is about.")] = None,
    edit: Annotated[bool, typer.Option("--edit", help="Draw the picture of --image anew.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Samples.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New file of the drawing; else drawing.png, -2, ..."),
    ] = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Draw a prompt; with an image file, or of a model that does not draw, answer it."""
    from lvrpo.runs.inference import sample_prompt

    with one_line_errors(debug):
        said, notes = sample_prompt(
            run,
            prompt,
            image,
            edit=edit,
            count=count,
            seed=seed,
            output=output,
            device=device,
        )
        _notes(notes)
        for each in said:
            typer.echo(each)


@app.command(
    epilog="Examples:  lvrpo export runs/mine models/mine  |  "
    "lvrpo export runs/mine models/mine-adapter --adapter"
)
def export(
    run: Annotated[Path, typer.Argument(help="Run directory with a checkpoint.")],
    folder: Annotated[Path, typer.Argument(help="To be made; nothing is replaced.")],
    step: Annotated[
        int | None, typer.Option(help="Of the checkpoint, counted through both phases; the newest.")
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="The weights of the end of the warm start.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="What a LoRA has trained, alone; else it is merged.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write the weights of a run as a folder of transformers, of BAGEL, or of the unified model."""
    with one_line_errors(debug):
        from lvrpo.runs.export import export_run

        export_run(run, folder, step=step, reference=reference, adapter=adapter)
        typer.echo(f"export: {folder}")


@app.command(epilog="Example:  lvrpo report runs/digits --compare runs/control")
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    compare: Annotated[
        list[Path] | None, typer.Option(help="Other runs to set beside it; may be repeated.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; else RUN/report.html.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write report.html, and its figures into a folder beside it."""
    with one_line_errors(debug):
        _write_report(run, compare or [], output)


studies = typer.Typer(
    name="study",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Ask many runs, or finished ones, what the report of one cannot say.",
)
app.add_typer(studies)


def _add_study(name: str, about: str) -> None:
    """The command of a study of many runs; all of them take the same options."""

    @studies.command(name, help=about, epilog=f"Example:  lvrpo study {name} runs/{name}")
    def study(
        directory: Annotated[Path, typer.Argument(help="Of the study; one that is there goes on.")],
        config: ConfigFile = None,
        seeds: Annotated[
            int | None, typer.Option(min=1, help="How many, from 0 on; five of a new study.")
        ] = None,
        steps: Annotated[
            int | None, typer.Option(help="Policy updates of every run (run.steps).")
        ] = None,
        items: Annotated[
            int | None, typer.Option(help="Held-out prompts of a skill (run.eval_items).")
        ] = None,
        jobs: Annotated[
            int | None, typer.Option(min=1, help="Runs at once, of a thread each; one per core.")
        ] = None,
        set_: Overrides = None,
        debug: Debug = False,
    ) -> None:
        overrides = list(set_ or [])
        overrides += [] if steps is None else [f"run.steps={steps}"]
        overrides += [] if items is None else [f"run.eval_items={items}"]
        with one_line_errors(debug):
            from lvrpo.studies.catalogue import STUDIES
            from lvrpo.studies.command import run_study

            try:
                end = run_study(
                    directory, STUDIES[name], overrides, config=config, seeds=seeds, jobs=jobs
                )
            except KeyboardInterrupt as stop:
                _stopped(stop, f"lvrpo study {name} {directory}")
        if end.page is not None:
            typer.echo(f"study: {end.page}")
        if end.failed:
            fail(f"failed, see their logs in {directory}: {', '.join(end.failed)}", code=1)


_add_study("demo", "LVRPO, supervised training of equal compute, and shuffled rewards.")
_add_study("reward-balance", "How rewards should be added, and what each teaches alone.")
_add_study("machinery", "What the clip, the KL, minibatches and windows of steps add.")


@studies.command(
    name="reward-attacks", epilog="Example:  lvrpo study reward-attacks runs/digits --items 256"
)
def study_reward_attacks(
    run: Annotated[Path, typer.Argument(help="Run directory with a finished warm start.")],
    items: Annotated[int, typer.Option(min=1, help="Held-out drawing prompts.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attacks.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file; else RUN/studies/reward-attacks.json."),
    ] = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Set drawings made to please the rewards of a run against the right ones."""
    with one_line_errors(debug):
        from lvrpo.runs.files import write_atomically
        from lvrpo.studies.reward_attacks import reward_attacks

        path = output or run / "studies" / "reward-attacks.json"
        if output is not None and not output.parent.is_dir():  # said before the work, not after
            fail(f"{output}: cannot be written: no folder {output.parent}")
        found = reward_attacks(run, items=items, seed=seed, device=device)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, found.to_json().encode() + b"\n")
        typer.echo("\n".join([*found.lines(), f"study: {path}"]))


@app.command(
    epilog="Examples:  lvrpo plan --config mine.toml  |  "
    "lvrpo plan --config mine.toml --ranks 8 --bf16 --checkpointing --gpu"
)
def plan(
    config: ConfigFile = None,
    set_: Overrides = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="That share parameters and groups, as by fully_shard.")
    ] = 1,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="As with run.precision=bf16: fp32 master weights.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="As with model.gradient_checkpointing=true.")
    ] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="As with run.device=cuda: its kernels and chunks.")
    ] = False,
    rate: Annotated[
        float, typer.Option(min=0, help="FLOPs a second of a rank, with --bandwidth: seconds.")
    ] = 0.0,
    bandwidth: Annotated[
        float, typer.Option(min=0, help="Bytes a second that a rank receives, with --rate.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Print the tables of docs/scaling.md and stop.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Forecast memory, FLOPs and traffic of a run before it starts; formulas, no measurement."""
    with one_line_errors(debug):
        from lvrpo.planning.memory import Numerics
        from lvrpo.runs.config_file import load_config
        from lvrpo.runs.plan import plan_run
        from lvrpo.runs.plan_view import show, to_json
        from lvrpo.runs.scaling import tables

        if scaling:
            typer.echo(tables())
            return
        if bool(rate) != bool(bandwidth):
            fail(f"plan: --rate is {rate:g} and --bandwidth {bandwidth:g}, expected both or none")
        wanted = load_config(config, set_ or [])
        narrow = bf16 or wanted.run.precision == "bf16"
        on_gpu = gpu or wanted.run.device.startswith("cuda")
        again = checkpointing or wanted.model.gradient_checkpointing
        numerics = Numerics(2 if narrow else 4, fused_norms=on_gpu, checkpointing=again)
        found = plan_run(wanted, numerics, ranks=ranks, on_gpu=on_gpu)
        told = found.to_dict(rate, bandwidth)
        typer.echo(to_json(told)) if as_json else show(told)


@app.command()
def info() -> None:
    """Versions, the compiled extension, and which backend runs which op here."""
    from lvrpo.info import describe

    typer.echo(describe())


def _write_report(run: Path, compare: list[Path], output: Path | None = None) -> None:
    from lvrpo.report.page import write_report

    typer.echo(f"report: {write_report(run, compare=compare, output=output)}")


def _report_of_training(run: Path) -> None:
    """The report, or one line on how to get it: a run is done without it."""
    from lvrpo.info import packages_of, require

    try:
        require(*packages_of("report"), extra="report")
    except ModuleNotFoundError as missing:
        _notes([f"no report: {missing}, then: lvrpo report {run}"])
    else:
        _write_report(run, [])


def _stopped(stop: KeyboardInterrupt, command: str) -> NoReturn:
    """Say how to go on after a signal, and end as it demands."""
    from lvrpo.runs.signals import Stopped
    from lvrpo.trainer.ranks import is_said_by_first

    signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
    name = signal.Signals(signum).name
    with contextlib.suppress(OSError):  # of a terminal that is gone
        if not is_said_by_first(stop):
            typer.echo(f"stopped by {name}; go on with: {command}", err=True)
    raise typer.Exit(128 + signum) from None


def _notes(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(f"lvrpo: note: {line}", err=True)


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn an error into one line: exit code 2 for what the user can mend, 1 for all else."""
    try:
        yield
    except (typer.Exit, ModuleNotFoundError):  # the latter is for lvrpo/__main__.py to explain
        raise
    except Exception as error:
        if debug:
            raise
        from lvrpo.runs.errors import USER_ERRORS
        from lvrpo.trainer.ranks import is_said_by_first

        if is_said_by_first(error):
            raise typer.Exit(2 if isinstance(error, USER_ERRORS) else 1) from None
        if isinstance(error, OSError) and error.filename and error.strerror:
            fail(f"{error.filename}: {error.strerror}")
        if isinstance(error, USER_ERRORS):
            fail(str(error))
        said = str(error).strip().partition("\n")[0]
        fail(f"{type(error).__name__}: {said} (--debug shows where)", code=1)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line and end."""
    typer.echo(f"lvrpo: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """The command itself; lvrpo/__main__.py comes before it."""
    app()
