"""Configs whose text can be read back: nothing in a name or a path becomes code on the way."""

from __future__ import annotations

from mmengine.config import Config


class WrittenConfig(Config):
    """
    A config whose `dump` gives back every string as it was, whoever reads the file.

    mmengine replaces `{{$NAME:default}}`, `{{ fileDirname }}` and the like in the text of a config before it runs it,
    inside of strings too. A class name of a downloaded data set could leave its quotes that way and become code.
    """

    def __init__(self, config: Config) -> None:
        self.__setstate__(config.__getstate__())  # all of it, as a copy by pickle would take it

    @property
    def pretty_text(self) -> str:
        # Two braces in a row stand in strings only: a dict is no key of a dict.
        return super().pretty_text.replace("{{", "{\\x7b")
