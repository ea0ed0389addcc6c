"""The command `completion`: what a shell needs to complete commands, options, choices and file names."""

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]


@click.command(short_help="Completion for bash, zsh or fish.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes commands, options, choices and file names of afpq.

    \b
    Examples:
      eval "$(afpq completion bash)"          # in ~/.bashrc: every shell
      afpq completion zsh > ~/.zfunc/_afpq    # a folder of fpath
      afpq completion fish > ~/.config/fish/completions/afpq.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    root = click.get_current_context().find_root().command
    click.echo(found(root, {}, "afpq", "_AFPQ_COMPLETE").source())
