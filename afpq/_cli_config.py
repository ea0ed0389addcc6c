"""Options of a command in a file: `--config run.toml` stands for the options in it, `--save-config` writes such a file.

A file has one line an option, by its long name without dashes, and the argument by its own: `model = "net.onnx"`,
`bits = 4.5`, `exclude = ["/fc/*"]`, `bn-recal = false`. What is given on the command line as well counts from there.
"""

import json
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["config_options", "save_config"]

# Of one call, not of the result.
_NOT_SAVED = {"config", "save_config", "force", "resume", "dry_run", "as_json"}
_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--config` and `--save-config`; the command calls `save_config`."""
    config = click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="RUN.toml",
        is_eager=True,
        expose_value=False,
        callback=_read,
        help="Take options from this file, each by its long name; the command line comes first.",
    )
    save = click.option(
        "--save-config",
        type=click.Path(path_type=Path),
        metavar="RUN.toml",
        help="Write the options of this call for --config.",
    )
    return config(save(command))


def save_config(context: click.Context) -> str:
    """The options that were given, as the text of such a file."""
    lines = []
    for parameter in context.command.params:
        name = parameter.name
        if name is None or name in _NOT_SAVED:
            continue
        if context.get_parameter_source(name) in _GIVEN:
            lines.append(f"{_key(parameter)} = {_toml(context.params[name])}\n")
    return "".join(lines)


def _read(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path}: not a TOML file: {error}") from error
    parameters = {
        _key(p): p for p in context.command.params if p.name not in (*_NOT_SAVED, "help", None)
    }
    for key, value in given.items():
        if key not in parameters:
            near = get_close_matches(key, parameters, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"{path}: no option is called {key!r}{hint}")
        _check(path, key, value, parameters[key])
    named = {str(parameters[key].name): value for key, value in given.items()}
    context.default_map = {**(context.default_map or {}), **named}


def _key(parameter: click.Parameter) -> str:
    """The long name of an option, the name of an argument."""
    if isinstance(parameter, click.Argument):
        return str(parameter.name)
    return max(parameter.opts, key=len).lstrip("-")


def _check(path: Path, key: str, value: Any, parameter: click.Parameter) -> None:
    """Refuses what the command line could not say."""
    takes_bool = isinstance(parameter, click.Option) and parameter.is_flag
    takes_list = isinstance(parameter, click.Option) and parameter.multiple
    if takes_bool:
        fits, wanted = isinstance(value, bool), "true or false"
    elif takes_list:
        fits = isinstance(value, list) and all(isinstance(x, str) for x in value)
        wanted = "a list of texts"
    else:
        fits = isinstance(value, str | int | float) and not isinstance(value, bool)
        wanted = "a text or a number"
    if not fits:
        raise click.UsageError(
            f"{path}: {key} takes {wanted}, not {json.dumps(value, default=str)}"
        )


def _toml(value: Any) -> str:
    if isinstance(value, dict):  # of --layer
        value = [f"{pattern}={fmt}" for pattern, fmt in value.items()]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # Numbers, true, false and escaped texts are written as in JSON.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
