"""Arguments that several commands have."""

from typing import Annotated

import typer

Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, or the name of a packed configuration such as digits."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replace values, such as train.lr=0.1."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Workers to start; this process alone if not given.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Connect to another machine without a token.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option(metavar="PACKAGE", help="A package whose callables the configuration may name."),
]
