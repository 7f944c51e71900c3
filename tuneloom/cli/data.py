"""`tuneloom data check` and `tuneloom data show`: what becomes of one's data, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tuneloom.config import Config
    from tuneloom.data.conversations import ConversationReader
    from tuneloom.data.render import Renderer
    from tuneloom.data.view import RowView

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at conversations before they are trained on.")

SourceArgument = Annotated[
    str, typer.Argument(help="A file, a folder, a built-in set, a hub id; or a config (YAML) or recipe for all of its sources.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Whose tokenizer and chat template to use. None: the config's, or the embedded one."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. --set data.cutoff_len=512. Repeatable."),
]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns", metavar="OURS=THEIRS", help="Name of a column in the file, e.g. instruction=question. Repeatable."
    ),
]


@app.command()
def check(
    source: SourceArgument,
    model: ModelOption = None,
    set_: SetOption = None,
    columns: ColumnsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first row that cannot be used, with exit code 2.")
    ] = False,
    problems: Annotated[int, typer.Option("--problems", min=0, help="Bad rows listed at most.")] = 20,
) -> None:
    """Count what is read, used, repaired, cut and dropped, with file, line, reason and mend."""
    import json

    from tuneloom.cli.data_report import print_report, reading_progress
    from tuneloom.data.check import check_data

    config, readers = _settings(source, model, set_, columns)
    renderer = _renderer(config)
    with reading_progress(shown=not as_json) as progress:
        report = check_data(config.data, readers, renderer, strict=strict, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.as_dict() | {"cutoff_len": config.data.cutoff_len}, ensure_ascii=False, indent=2))
    else:
        print_report(report, config.data.cutoff_len, problems)
    for each in report.sources:
        each.refuse_unusable()


@app.command()
def show(
    source: SourceArgument,
    model: ModelOption = None,
    set_: SetOption = None,
    columns: ColumnsOption = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows shown at most.")] = 3,
    start: Annotated[int, typer.Option("--from", min=1, help="The first row shown, counted from 1.")] = 1,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write them to one self-contained page instead.")
    ] = None,
) -> None:
    """Show rows as chat and as tokens, coloured by whether they are learnt."""
    from itertools import islice

    from tuneloom.cli.data_page import num_rows, write_page
    from tuneloom.cli.data_report import print_rows
    from tuneloom.data.view import view_rows
    from tuneloom.errors import UserError

    config, readers = _settings(source, model, set_, columns)
    renderer = _renderer(config)
    reports = []

    def every() -> Iterator[RowView]:
        for reader in readers:
            reports.append(reader.new_report())
            yield from view_rows(reader, reports[-1], config.data, renderer)

    shown = list(islice(every(), start - 1, start - 1 + rows))
    if not shown:
        raise UserError(
            "no row to show", where=source, got=f"--from {start}", mend=f"see why with: tuneloom data check {source}"
        )
    if html is None:
        print_rows(shown)
    else:
        write_page(html, source, config, shown)
        typer.echo(f"written   {html} ({num_rows(shown)})")
    for line in (line for report in reports for line in report.unfilled_lines()):
        typer.echo(f"placeholder {line}")
    if passed_over := sum(report.dropped_by_reason.total() for report in reports):
        typer.echo(f"passed over so far: {passed_over:,} that cannot be used; see why with: tuneloom data check {source}")


def _settings(
    source: str, model: str | None, sets: list[str] | None, columns: list[str] | None
) -> tuple[Config, list[ConversationReader]]:
    """Return the config, and readers of the sources to look at, whose files are there."""
    from tuneloom.config import load_config, parse_config
    from tuneloom.config.recipes import find_recipe, recipe_names
    from tuneloom.errors import UserError

    sets = list(sets or [])
    if model is not None:
        sets.append(f"base_model={model}")
    if Path(source).suffix.lower() in (".yaml", ".yml") or source in recipe_names():
        if columns:
            raise UserError("--columns goes with a file", where="--columns", mend="write columns into the config's sources")
        config = load_config(find_recipe(source), sets)
        return config, _readers(config)
    if any(text.partition("=")[0].strip() == "data.train" for text in sets):
        raise UserError("the source is given twice", where="--set data.train", got=source, mend="leave --set data.train out")
    values = load_config(None, sets).model_dump(mode="json")
    values["data"]["train"] = [{"path": source, "columns": dict(_column(text) for text in columns or [])}]
    config = parse_config(values)
    return config, _readers(config)


def _readers(config: Config) -> list[ConversationReader]:
    from tuneloom.data.conversations import ConversationReader

    return [ConversationReader(source, config.data.variables, role) for role, source in config.data.roles()]


def _column(text: str) -> tuple[str, str]:
    from tuneloom.errors import UserError

    ours, separator, theirs = text.partition("=")
    if not (ours and separator and theirs):
        raise UserError("a column is given as OURS=THEIRS", where="--columns", got=text, expected="e.g. instruction=question")
    return ours, theirs


def _renderer(config: Config) -> Renderer:
    from tuneloom.data.render import Renderer
    from tuneloom.models.load import load_tokenizer_folder
    from tuneloom.models.source import resolve_model

    base = resolve_model(
        config.base_model.path, revision=config.base_model.revision, say=lambda line: typer.echo(line, err=True)
    )
    return Renderer(load_tokenizer_folder(base.folder))
