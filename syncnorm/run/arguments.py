"""Arguments that several commands have."""

from typing import Annotated

import typer

Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, or the name of a packed configuration such as digits.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replace values, such as train.lr=0.1."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(metavar="PACKAGE", help="A package whose callables the configuration may name."),
]
