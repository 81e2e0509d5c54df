"""The application that every verb registers with."""

from __future__ import annotations

import typer

from loract import __version__
from loract.cli import audit, bench, demo, env, estimate, inspect, plan, profile, report
from loract.cli import train as runs

app = typer.Typer(
    name="loract",
    help="Fine-tune large models in a fraction of the activation memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_VERBS = (
    runs.init,
    demo.demo,
    audit.audit,
    estimate.estimate,
    inspect.inspect,
    plan.plan,
    profile.profile,
    runs.export,
    report.report,
    env.env,
)
for verb in _VERBS:
    app.command()(verb)
app.add_typer(bench.app, name="bench")
for verb in (runs.train, runs.validate):
    app.command(context_settings=runs.OVERRIDES)(verb)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Fine-tune large models in a fraction of the activation memory."""
