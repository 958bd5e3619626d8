"""The commands of the README: each option of ours exists, each file is there."""

import re
import shlex

from program import DEPLOY, ROOT, check_options

README = (DEPLOY / "README.md").read_text()


def commands():
    """The words of every command in a block of code; continued lines are one."""
    for block in re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def test_our_own_commands_have_options_that_exist():
    ours = [words[words.index("tidemill") + 1 :] for words in commands() if "tidemill" in words]
    servers = [arguments for arguments in ours if arguments and arguments[0] in ("serve", "gateway")]
    assert len(servers) >= 3
    for arguments in servers:
        check_options(arguments)


def test_files_that_it_names_are_there():
    named = {word for words in commands() for word in words if word.startswith("server/deploy/")}
    assert len(named) >= 6
    for path in named:
        assert (ROOT / path).exists(), path


def test_everything_here_is_named():
    for folder in DEPLOY.iterdir():
        assert folder.name in README or folder.name == "README.md", folder.name
